"""A file of JSON objects, one per line in the order of steps, that survives killed processes, full disks and damage."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import first_line

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends lines to a file. Lines that cannot be written are kept until the next write, and training goes on."""

    def __init__(self, path: epath.Path, start: int, drop_kind: str = ""):
        """Prepares the file for a run that continues after `start` steps.

        Lines of later steps are dropped, and so are lines of kind `drop_kind` at step `start`. Damaged lines are moved to a
        separate file, and so are all lines if the run starts over.
        """
        self._path, self._pending, self._failed = path, "", False
        with files.writing(path, "free some space, or move it away"):
            self._prepare(start, drop_kind)

    def _prepare(self, start: int, drop_kind: str) -> None:
        path = self._path
        content = path.read_bytes() if path.exists() else b""
        lines = [(line, _parse(line)) for line in content.split(b"\n") if line.strip()]
        good = [(line, values) for line, values in lines if values and values["step"] <= start]
        kept = b"".join(line + b"\n" for line, v in good if v["step"] < start or v.get("kind") != drop_kind)
        if damaged := [line for line, values in lines if values is None]:
            aside = self._set_aside("damaged", damaged)
            logger.warning("%s: moved %s damaged line(s) to %s and kept the others", path, len(damaged), aside)
        if earlier := [line for line, values in lines if values and start == 0 < values["step"]]:
            aside = self._set_aside("earlier", earlier)
            logger.warning("there is no checkpoint, so training starts over; moved the earlier lines of %s to %s", path, aside)
        if kept != content:
            files.write_atomic(path, kept)

    def _set_aside(self, kind: str, lines: Sequence[bytes]) -> str:
        """Appends lines to the separate file for `kind`, and returns the name of that file."""
        aside = self._path.with_name(f"{self._path.stem}.{kind}{self._path.suffix}")
        before = aside.read_bytes() if aside.exists() else b""
        files.write_atomic(aside, before + b"".join(line + b"\n" for line in lines))
        return aside.name

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends a line. In a bucket, where appending uploads the whole file again, it is only written by `flush`."""
        self._pending += json.dumps(values, default=float) + "\n"
        if not files.is_remote(self._path):
            self.flush()

    def flush(self) -> None:
        """Writes the pending lines. If this fails, logs why, once."""
        if not self._pending:
            return
        size = None
        try:
            with self._path.open("a") as file:
                size = file.tell()
                file.write(self._pending)
        except Exception as error:  # from the disk or the bucket client
            if size is not None and not files.is_remote(self._path):
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)  # removes a partial line
            if not self._failed:
                reason = first_line(error)
                logger.warning(f"{self._path}: cannot be written ({reason}); its lines are kept, and training goes on")
            self._failed = True
        else:
            self._pending, self._failed = "", False

    def close(self) -> None:
        """Writes the pending lines, or logs how many are lost."""
        self.flush()
        if self._pending:
            logger.warning("%s: %s line(s) could not be written", self._path, self._pending.count("\n"))


def read(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a file that are not damaged; none if there is no file."""
    lines = path.read_bytes().splitlines() if files.is_there(path) else []
    return [values for line in lines if (values := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the values of a line with their step, or None if the line is damaged."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return values if isinstance(step, int) and not isinstance(step, bool) else None
