"""A file of JSON objects, one a line in the order of steps, that outlives kills, full disks and damage."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from pspnet_jax import files
from pspnet_jax.train.integrity import reason

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends to a file; what cannot be written waits for the next line, and training does not stop for it."""

    def __init__(self, path: epath.Path, start: int, without: str = ""):
        """Goes on after `start` steps: drops the lines of later ones, and sets damaged ones aside, beside the file.

        Of those of step `start`, it drops the kind `without`. Where a run starts anew, it sets the earlier one's lines aside.
        """
        self._path, self._waiting, self._failed = path, "", False
        with files.writing(path, "make room, or move it away"):
            self._tidy(start, without)

    def _tidy(self, start: int, without: str) -> None:
        path = self._path
        content = path.read_bytes() if path.exists() else b""
        lines = [line for line in content.split(b"\n") if line.strip()]
        steps = [_step(line) for line in lines]
        good = [(line, step) for line, step in zip(lines, steps, strict=True) if step is not None and step <= start]
        kept = b"".join(
            line + b"\n" for line, step in good if step < start or not without or json.loads(line).get("kind") != without
        )
        if damaged := [line for line, step in zip(lines, steps, strict=True) if step is None]:
            aside = self._set_aside("damaged", damaged)
            logger.warning("%s: %s damaged line(s), moved to %s; the others are kept", path, len(damaged), aside)
        if earlier := [line for line, step in zip(lines, steps, strict=True) if step is not None and start == 0 < step]:
            aside = self._set_aside("earlier", earlier)
            logger.warning("there is no checkpoint: training starts anew, and the earlier lines of %s are in %s", path, aside)
        if kept != content:
            with files.atomic(path) as temporary:
                temporary.write_bytes(kept)

    def _set_aside(self, kind: str, lines: Sequence[bytes]) -> str:
        """Adds lines to the file for those of a kind, and returns its name."""
        aside = self._path.with_name(f"{self._path.stem}.{kind}{self._path.suffix}")
        before = aside.read_bytes() if aside.exists() else b""
        with files.atomic(aside) as temporary:
            temporary.write_bytes(before + b"".join(line + b"\n" for line in lines))
        return aside.name

    def write(self, values: Mapping[str, Any]) -> None:
        """Adds a line; a bucket, where adding is to upload it all again, gets it when `flush` is called."""
        self._waiting += json.dumps(values, default=float) + "\n"
        if not files.is_remote(self._path):
            self.flush()

    def flush(self) -> None:
        """Writes the lines that wait, or says once why they cannot be written."""
        if not self._waiting:
            return
        size = None
        try:
            with self._path.open("a") as file:
                size = file.tell()
                file.write(self._waiting)
        except Exception as error:  # of the disk, or of a bucket's client
            if size is not None and not files.is_remote(self._path):
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)  # no half a line
            if not self._failed:
                logger.warning("%s: cannot be written (%s); its lines wait, and training goes on", self._path, reason(error))
            self._failed = True
        else:
            self._waiting, self._failed = "", False

    def close(self) -> None:
        """Writes what waits, or says what is lost."""
        self.flush()
        if self._waiting:
            logger.warning("%s: %s line(s) could not be written", self._path, self._waiting.count("\n"))


def _step(line: bytes) -> int | None:
    """The step of a line; None where it is damaged."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
