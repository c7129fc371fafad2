"""Replaces JAX's report that another process of the job is gone by one sentence. Runs as a process of its own: see `peers`.

JAX ends a process whose peer is gone by aborting it, after writing 20 to 60 lines to stderr: a C++ stack trace among them. No
Python code runs in a process after that. So this program reads its stderr through a pipe, and passes on everything else.
"""

import os
import re
import select
import signal
import sys
from collections.abc import Callable

STARTS = re.compile(rb"[WEF]\d{4} [\d:.]+ +\d+ (?:coordination_service\w*|preemption_sync_manager|client)\.(?:cc|h):\d+\] ")
FATAL = b"the JAX distributed service detected fatal errors"
SILENT = re.compile(rb"stopped sending heartbeats\):\n((?:\S*\d+\n)+)")  # followed by the numbers of processes, one a line
NO_COORDINATOR = re.compile(rb"Failed to send RPC to coordination service|DEADLINE_EXCEEDED: [^\n]*\s+RPC: \S+/Heartbeat")
ADVICE = b"\0advice "  # begins a line of the process itself, with the end of the sentence
PAUSE = 2.0  # seconds of silence after which a report is complete


class Translator:
    """Passes on what a process writes to stderr, but a report that it ends because of another process as one sentence."""

    def __init__(self, write: Callable[[bytes], object]):
        self._write, self._line, self._report, self._advice = write, b"", b"", b""

    def add(self, text: bytes) -> None:
        """Adds what was written; incomplete lines wait for their end."""
        *lines, self._line = (self._line + text).split(b"\n")
        for line in (line + b"\n" for line in lines):
            if line.startswith(ADVICE):
                self._advice = line.removeprefix(ADVICE).strip()
            elif self._report or STARTS.match(line):
                self._report += line
            else:
                self._write(line)

    @property
    def holding(self) -> bool:
        """Whether a report or a line is held back, because it may go on."""
        return bool(self._report or self._line)

    def flush(self) -> None:
        """Writes what was held back: a report as one sentence if JAX ended the process, else as it is."""
        text, self._report, self._line = self._report + self._line, b"", b""
        self._write(sentence(text, self._advice) if FATAL in text else text)


def sentence(report: bytes, advice: bytes) -> bytes:
    """Returns the line that replaces JAX's report. Process 0 runs the coordination service."""
    numbers = sorted({int(number) for found in SILENT.findall(report) for number in re.findall(rb"(\d+)\n", found)})
    if not numbers and NO_COORDINATOR.search(report):
        numbers = [0]
    listed = ", ".join(map(str, numbers))
    who = "another process" if not numbers else f"process {listed}" if len(numbers) == 1 else f"processes {listed}"
    verb = "are" if len(numbers) > 1 else "is"
    start = f"error: {who} of this job {verb} gone (killed, preempted or not reachable; see its own messages); "
    return start.encode() + advice + b"\n"


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # ends when the process does
    translator = Translator(lambda text: os.write(sys.stdout.fileno(), text))
    while True:
        if translator.holding and not select.select([sys.stdin], [], [], PAUSE)[0]:
            translator.flush()
        elif text := os.read(sys.stdin.fileno(), 1 << 16):
            translator.add(text)
        else:
            return translator.flush()


if __name__ == "__main__":
    main()
