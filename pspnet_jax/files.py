"""Paths, local and gs://, and writing a file so that a killed process never leaves half of it."""

import contextlib
import os
import secrets
from collections.abc import Iterator

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
    """The path without "~" and relative parts; a remote one, such as gs://bucket/run, as it is."""
    if "://" in os.fspath(path):
        return epath.Path(path)
    return epath.Path(os.path.abspath(os.path.expanduser(path)))


@contextlib.contextmanager
def atomic(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary path beside `path` to write to, with the same ending; it becomes `path` when the block ends well."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")  # short, however long the name is
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
