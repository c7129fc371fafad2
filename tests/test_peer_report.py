"""JAX's reports of lost processes, as JAX 0.10 and 0.12 write them, become one sentence."""

import os
import subprocess
import sys
import time

import pytest

from pspnet_jax import peer_report
from pspnet_jax.peer_report import Translator

TRACE = b"""\
*** Check failure stack trace: ***
    @     0x7fb6fc040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
    @     0x7fb6f81040ee  xla::CoordinationServiceAgent::SetError()
    @     0x7fb7034a71f5  (unknown)
"""
POLLED = b"""\
E1129 04:04:06.944844    5103 coordination_service_agent.cc:289] Polled an error from coordination service (this can be an \
error from this or another task).
"""
FATAL = b"""\
F1129 04:04:06.944971    5103 client.h:80] Terminating process because the JAX distributed service detected fatal errors. \
This most likely indicates that another task died; see the other task logs for more details. Disable Python buffering, i.e. \
`python -u`, to be sure to see all the previous output. absl::Status: """
SILENT = (
    b"UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n%sThe tasks have crashed. Check the logs."
)
FIRST = b"""\
E1129 04:04:06.944471    5092 coordination_service.cc:1549] [1549] Use error polling to propagate the following error to all \
tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error. [type.googleapis.com/tensorflow.CoordinationServiceError='']
"""
CLOSED = b"""\
UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died/restarted unexpectedly or \
this task is experiencing network issues.
Additional GRPC error information from remote target coordination_service while calling /xla.coordination/PollForError:
:UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Socket closed"}
"""
PREEMPTION = b"""\
W1129 04:05:12.929700   15919 preemption_sync_manager.cc:147] Failed to retrieve preemption notice from coordination service: \
UNAVAILABLE: Stream removed (Socket closed)
:UNAVAILABLE:Stream removed (Socket closed)
=== Source Location Trace: ===\x20
external/xla+/xla/tsl/distributed_runtime/rpc/grpc_util.h:89
. This is only expected if one of the tasks is unhealthy. Check the logs for the actual root cause.
E1129 04:05:12.929797   15919 preemption_sync_manager.cc:159] Failed to cancel preemption barrier: FAILED_PRECONDITION: Tried.
"""
FROZEN = b"DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/Heartbeat\n"

REPORTS = {  # what JAX writes, and who is gone
    "the first process has lost the second": (FIRST + POLLED + FATAL + SILENT % b"1\n" + TRACE, "process 1 of this job is"),
    "the third has lost two others": (POLLED + FATAL + SILENT % b"12\n3\n" + TRACE, "processes 3, 12 of this job are"),
    "JAX 0.9": (POLLED + FATAL + SILENT % b"/job:jax_worker/replica:0/task:3\n", "process 3 of this job is"),
    "process 0 was killed": (PREEMPTION + POLLED + FATAL + CLOSED + TRACE, "process 0 of this job is"),
    "its host is frozen": (FATAL + FROZEN + TRACE, "process 0 of this job is"),
    "another reason": (FATAL + b"ABORTED: Leader incarnation ID mismatch" + TRACE, "another process of this job is"),
}


def translated(*chunks: bytes) -> list[str]:
    written: list[bytes] = []
    translator = Translator(written.append)
    for chunk in chunks:
        translator.add(chunk)
    translator.flush()
    return b"".join(written).decode().splitlines()


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("size", [7, 100_000])
def test_a_report_becomes_one_sentence(name, size):
    report, who = REPORTS[name]
    text = b"step 1\n" + peer_report.ADVICE + b"start again\n" + b"step 2\n" + report
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    expected = f"error: {who} gone (killed, preempted or not reachable; see its own messages); start again"
    assert translated(*chunks) == ["step 1", "step 2", expected]


@pytest.mark.parametrize("text", [PREEMPTION, FIRST, b"", b"no newline", b"W1129 04:05:12.9   159 cpu_client.cc:1] slow\n\n"])
def test_everything_else_is_passed_on(text):
    assert translated(text, b"a\nb\n") == (text + b"a\nb\n").decode().splitlines()


@pytest.mark.slow
def test_the_program_passes_lines_on_at_once_and_held_lines_after_a_pause():
    """It ends with its input, and no signal of the terminal or the launcher ends it before."""
    command = [sys.executable, "-I", "-S", peer_report.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as program:
        began = time.monotonic()
        program.stdin.write(b"step 1\nincomplete")
        assert os.read(program.stdout.fileno(), 1000) == b"step 1\n"
        program.terminate()
        assert time.monotonic() - began < peer_report.PAUSE
        assert os.read(program.stdout.fileno(), 1000) == b"incomplete"
        program.stdin.write(POLLED + FATAL + CLOSED)
        program.stdin.close()
        assert program.stdout.read().count(b"\n") == 1
    assert program.returncode == 0
