"""Lets the processes of a job meet before JAX connects them, so that missing and differing ones are named.

`jax.distributed.initialize` says neither who is missing nor why: after its timeout it aborts the process with a stack trace of
C++, and its key-value store cannot be used until all processes are connected. So the first process listens on its own for the
others, on the port that JAX will use next, which is therefore known to be reachable, and answers all of them at once.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

import pspnet_jax
from pspnet_jax.clusters import Place
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
REPORT_EVERY = 30.0  # seconds between two log lines about missing processes
RETRY_AFTER = 0.5  # seconds until a process tries to reach the first one again
PATIENCE = 10.0  # seconds for a single connection or message
Connection = tuple[socket.socket, dict[str, Any]]  # to another process, and what it says about itself
MAX_LISTED = 5  # processes or values named in a message
CAUSES = (
    "usual causes: the command was not started on every host, it failed there (see the output of those processes), or a "
    "firewall or a wrong --coordinator keeps them apart"
)


def meet(place: Place, about: Mapping[str, str], timeout: float) -> list[str]:
    """Waits until all processes of the job are there, and returns their hosts. Every process has to call it.

    `about` is what has to be the same in all processes, such as the version of the code: short texts by name.

    Raises:
      UserError: processes are missing after the timeout, or differ; the message is the same in all that have come.
    """
    mine = {"process": place.process_id, "processes": place.processes, "host": socket.gethostname(), "about": dict(about)}
    answer = _gather(place, mine, timeout) if place.process_id == 0 else _join(place, mine, timeout)
    if error := answer.get("error"):
        raise UserError(error)
    return answer["hosts"]


def describe_differences(values: Mapping[str, Mapping[str, str]]) -> str:
    """Describes how the first process that differs from process 0 does so, and counts the others; "" if all are the same.

    The values are texts by name, keyed by the names of the processes.
    """
    (name, first), *_ = values.items()
    differing = {other: texts for other, texts in values.items() if texts != first}
    if not differing:
        return ""
    (other, texts), *more = differing.items()
    fields = [field for field in {**first, **texts} if texts.get(field) != first.get(field)]
    listed = [
        f"{field}={texts.get(field, 'missing')} instead of {first.get(field, 'missing')}" for field in fields[:MAX_LISTED]
    ]
    listed += [f"and {len(fields) - MAX_LISTED} more"] if len(fields) > MAX_LISTED else []
    listed += [f"{len(more)} more process(es) differ, too"] if more else []
    return f"{other} differs from {name}: {'; '.join(listed)}"


def code_version() -> dict[str, str]:
    """Returns the versions of JAX and Flax, and the version of this package with a digest of its files."""
    root = pathlib.Path(pspnet_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.txt") for path in root.rglob(pattern)):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {"the code of pspnet_jax": f"{pspnet_jax.__version__} ({digest.hexdigest()[:8]})", **versions}


def _gather(place: Place, mine: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Waits for the other processes, as the first one, and sends all of them the same answer, which is returned."""
    deadline, connections = time.monotonic() + timeout, list[Connection]()
    answer: dict[str, Any] = {}
    with contextlib.ExitStack() as closing:
        server = closing.enter_context(_listen(place.coordinator))
        while not answer:
            connections, members = _present(connections, mine)
            remaining = deadline - time.monotonic()
            if len(members) == place.processes:
                answer = {"hosts": [members[i]["host"] for i in range(place.processes)]}
            elif remaining <= 0:
                answer = {"error": f"after {timeout:.0f} s, {_missing(members, place)}; {CAUSES}"}
            elif (connection := _accept(server, min(REPORT_EVERY, remaining))) is None:
                logger.info(_missing(members, place))
            else:
                closing.enter_context(connection)
                if "process" in (member := _receive(connection)):  # otherwise it is a stranger, such as a port scan
                    connections, members = _present(connections, mine)  # others may have ended in the meantime
                    connections.append((connection, member))
                    answer = {"error": error} if (error := _problem(members, member)) else {}
        for connection, _ in connections:
            with contextlib.suppress(OSError):
                _send(connection, answer)
    return answer


def _present(connections: list[Connection], mine: dict[str, Any]) -> tuple[list[Connection], dict[int, dict[str, Any]]]:
    """Returns the connections that are still open, and the members that are there, by the number of their process."""
    connections = [known for known in connections if _is_open(known[0])]
    return connections, {0: mine} | {member["process"]: member for _, member in connections}


def _problem(members: Mapping[int, dict[str, Any]], member: dict[str, Any]) -> str:
    """Returns why a process cannot join those that are there, or ""."""
    first, names = members[0], [f"process {each['process']} ({each['host']})" for each in (members[0], member)]
    if member["processes"] != first["processes"]:
        return f"{names[1]} belongs to a job of {member['processes']} processes, but {names[0]} to one of {first['processes']}"
    if other := members.get(member["process"]):
        return (
            f"{names[1]} is there twice, on {other['host']} and on {member['host']}; each process needs a --process_id of its "
            "own, and each job a port of its own"
        )
    differences = describe_differences({names[0]: first["about"], names[1]: member["about"]})
    return differences and f"{differences}; start the same command with the same code on every host"


def _missing(members: Mapping[int, dict[str, Any]], place: Place) -> str:
    absent = [str(i) for i in range(place.processes) if i not in members]
    more = ", ..." if len(absent) > MAX_LISTED else ""
    there = ", ".join(f"{i} ({member['host']})" for i, member in sorted(members.items())[:MAX_LISTED])
    there += ", ..." if len(members) > MAX_LISTED else ""
    return (
        f"{len(members)} of {place.processes} processes have come to {place.coordinator}: {there}; missing: "
        f"{', '.join(absent[:MAX_LISTED])}{more}"
    )


def _join(place: Place, mine: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Reaches the first process, waits for its answer, and returns it."""
    host, port = _host_and_port(place.coordinator)
    deadline, reason = time.monotonic() + timeout, "there was no time to try"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(PATIENCE, remaining)) as connection:
                _send(connection, mine)
                connection.settimeout(timeout + PATIENCE)  # the first process answers at the end of its own timeout
                if answer := _receive(connection):
                    return answer
            reason = "it closed the connection"
        except OSError as error:
            reason = str(error)
        time.sleep(RETRY_AFTER)
    raise UserError(
        f"process {place.process_id} of {place.processes} ({mine['host']}) could not reach the first process at "
        f"{place.coordinator} within {timeout:.0f} s ({reason}); {CAUSES}"
    )


def _listen(coordinator: str) -> socket.socket:
    _, port = _host_and_port(coordinator)
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"the first process of this job cannot listen on port {port} ({os.strerror(error.errno or 0)}); stop the process "
            "that uses it, or choose another port, for all processes, with --coordinator HOST:PORT or JAX_COORDINATOR_PORT"
        ) from error


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _accept(server: socket.socket, timeout: float) -> socket.socket | None:
    server.settimeout(timeout)
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return None
    connection.settimeout(PATIENCE)
    return connection


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Returns a message, or an empty one if the other side sends something else or closes the connection."""
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(1 << 20))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _is_open(connection: socket.socket) -> bool:
    """Returns whether the other side, which sends nothing more, has not closed the connection."""
    return not select.select([connection], [], [], 0)[0]
