"""Processes meet, or learn in one sentence why they do not. Each is a thread here, whose name stands for its host."""

import contextlib
import pathlib
import re
import shutil
import socket
import threading
import time

import pytest

from pspnet_jax import rendezvous
from pspnet_jax.clusters import Place
from pspnet_jax.errors import UserError
from tests.processes import free_port


@pytest.fixture(autouse=True)
def hosts(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
    monkeypatch.setattr(rendezvous, "RETRY_AFTER", 0.02)


@pytest.fixture
def port():
    return free_port()


def meet_all(port, *members, timeout=20.0, delays=()):
    """Lets processes meet, given as (number of processes, process id, about), and returns what each gets: hosts or an error."""
    results = {}

    def run(index, processes, process_id, about):
        time.sleep(dict(enumerate(delays)).get(index, 0))
        try:
            results[index] = rendezvous.meet(Place(f"127.0.0.1:{port}", processes, process_id), about, timeout)
        except UserError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index, *member), name=f"host{index}") for index, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[index] for index in range(len(members))]


@pytest.mark.parametrize("delays", [(0, 0, 0, 0), (0.3, 0, 0, 0), (0, 0.3, 0, 0.2)])
def test_processes_that_start_one_after_the_other_get_all_hosts_in_order(port, delays):
    members = [(4, process, {"jax": "1"}) for process in (2, 0, 3, 1)]
    assert meet_all(port, *members, delays=delays) == [["host1", "host3", "host0", "host2"]] * 4
    socket.create_server(("", port)).close()  # JAX can use the port at once


def test_missing_processes_are_named_to_all_that_have_come(port):
    first, third = meet_all(port, (4, 0, {}), (4, 2, {}), timeout=1)
    assert first == third
    assert first.startswith(
        f"after 1 s, 2 of 4 processes have come to 127.0.0.1:{port}: 0 (host0), 2 (host1); missing: 1, 3; usual causes: "
    )
    assert "\n" not in first


def test_only_the_first_of_many_missing_processes_are_named(port):
    (message,) = meet_all(port, (256, 0, {}), timeout=0.1)
    assert "1 of 256 processes" in message
    assert "missing: 1, 2, 3, 4, 5, ...; usual" in message


def test_a_missing_first_process_is_named(port):
    (message,) = meet_all(port, (4, 1, {}), timeout=1)
    expected = (
        f"process 1 of 4 (host0) could not reach the first process at 127.0.0.1:{port} within 1 s ([Errno 111] Connection"
    )
    assert message.startswith(expected)


def test_without_any_time_a_process_does_not_come(port):
    (message,) = meet_all(port, (2, 1, {}), timeout=0)
    assert "could not reach the first process" in message


def test_a_process_that_differs_is_named_with_both_values(port):
    about = {"--mode": "train", "jax": "0.10.2"}
    messages = meet_all(port, (3, 0, about), (3, 1, about), (3, 2, about | {"jax": "0.12.0"}), delays=(0, 0, 0.2))
    assert messages == [messages[0]] * 3
    assert messages[0].startswith("process 2 (host2) differs from process 0 (host0): jax=0.12.0 instead of 0.10.2; start ")


def test_a_process_of_another_job_is_named(port):
    messages = meet_all(port, (2, 0, {}), (3, 1, {}))
    assert messages == ["process 1 (host1) belongs to a job of 3 processes, but process 0 (host0) to one of 2"] * 2


def test_two_processes_with_the_same_number_are_named(port):
    messages = meet_all(port, (3, 0, {}), (3, 1, {}), (3, 1, {}), delays=(0, 0.1, 0.3))
    assert messages == [messages[0]] * 3
    assert messages[0].startswith("process 1 (host2) is there twice, on host1 and on host2; each process needs")


def test_a_process_that_was_restarted_counts_once(port):
    """The first start of process 1 ends before process 2 comes."""
    first = threading.Thread(target=rendezvous.meet, args=(Place(f"127.0.0.1:{port}", 3, 0), {}, 20), name="first")
    first.start()
    _say(port, '{"process": 1, "processes": 3, "host": "gone", "about": {}}\n')
    assert meet_all(port, (3, 1, {}), (3, 2, {})) == [["first", "host0", "host1"]] * 2
    first.join()


@pytest.mark.parametrize("words", ["", "GET / HTTP/1.1\r\n\r\n", "[1]\n", "\xff\n"])
def test_strangers_are_ignored(port, words):
    stranger = threading.Thread(target=lambda: _say(port, words))
    stranger.start()
    assert meet_all(port, (2, 0, {}), (2, 1, {}), delays=(0, 0.3)) == [["host0", "host1"]] * 2
    stranger.join()


def _say(port, words):
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as connection:
            return connection.sendall(words.encode())
        time.sleep(0.01)


def test_a_port_in_use_is_named(port):
    with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
        (message,) = meet_all(port, (2, 0, {}))
    assert re.match(rf"the first process of this job cannot listen on port {port} \(Address already in use\); ", message)


def test_of_several_values_and_processes_that_differ_the_first_are_listed():
    first, other = ({f"field{i}": str(i + offset) for i in range(9)} for offset in (0, 1))
    message = rendezvous.describe_differences({"process 0": first, "process 1": first, "process 2": other, "process 3": {}})
    assert message.startswith("process 2 differs from process 0: field0=1 instead of 0; field1=2 instead of 1; ")
    assert message.endswith("; field4=5 instead of 4; and 4 more; 1 more process(es) differ, too")
    assert rendezvous.describe_differences({"process 0": first, "process 1": dict(first)}) == ""


def test_the_code_version_changes_with_any_file_of_the_package(tmp_path, monkeypatch):
    package = pathlib.Path(rendezvous.pspnet_jax.__file__).parent
    versions = [rendezvous.code_version()]
    copy = tmp_path / "pspnet_jax"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(rendezvous.pspnet_jax, "__file__", str(copy / "__init__.py"))
    for change in (None, "models/layers.py", "classes/voc2012.txt"):
        if change:
            with (copy / change).open("a") as file:
                file.write("\n")
        versions.append(rendezvous.code_version())
    assert versions[1] == versions[0]
    assert len({version["the code of pspnet_jax"] for version in versions}) == 3
