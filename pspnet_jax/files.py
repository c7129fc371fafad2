"""Local and gs:// paths, atomic file writes, and storage errors."""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

from pspnet_jax.errors import MissingFileError, UserError, causes, first_line

# Storage errors that the user can fix; libraries quote their texts in exceptions of their own.
_FULL_OR_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_OTHER = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
_REPORTS = "|".join(os.strerror(number) for number in _FULL_OR_CLOSED + _OTHER)


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether the path is in a bucket, such as gs://bucket/run."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path, with "~" expanded. A gs:// path is returned unchanged.

    Raises:
      UserError: the path has another scheme, or the current directory was deleted.
    """
    text = os.fspath(path).removeprefix("file://")
    if is_remote(text):
        if not text.startswith("gs://"):
            raise UserError(f"{text}: cannot be read or written here; expected a local path or gs://...")
        return epath.Path(path)
    try:
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    except FileNotFoundError as error:
        raise UserError("the current directory no longer exists; change to another one with cd") from error


def user_path(path: epath.PathLike) -> epath.Path:
    """Returns the absolute form of a path that the user typed, after checking that its bucket can be read.

    Without this check, TensorFlow would retry for minutes.

    Raises:
      MissingFileError: the bucket does not exist.
      UserError: the bucket cannot be read, or orbax's client for it is not installed.
    """
    found = absolute(path)
    if not is_remote(found):
        return found
    bucket = "/".join(os.fspath(found).split("/")[:3])
    try:
        import google.cloud.storage  # noqa: F401 -- used by orbax

        if not importlib.util.find_spec("tensorflow"):
            import gcsfs  # noqa: F401 -- used by etils
    except ImportError as error:
        raise UserError(f"{found}: gs:// needs other packages: pip install 'pspnet_jax[gcs]'") from error
    try:
        exists = epath.Path(bucket).exists()
    except Exception as error:  # TensorFlow's: no permission, no credentials, no connection
        raise UserError(f"{found}: {bucket} cannot be read ({first_line(error)})") from error
    if not exists:
        raise MissingFileError(f"{found}: there is no bucket {bucket}")
    return found


def user_cache() -> pathlib.Path:
    """Returns this package's directory in the user's cache, which may not exist; a relative path if no home is known."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "pspnet_jax"


def is_there(path: epath.PathLike) -> bool:
    """Returns whether the path exists. Unlike `exists`, it raises OSError if storage is unavailable."""
    if is_remote(path):
        return epath.Path(path).exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the JSON object in a file; empty if the file is missing or damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        if is_there(path) and isinstance(found := json.loads(path.read_bytes()), dict):
            return found
    return {}


@contextlib.contextmanager
def atomic(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary path with the same suffix, in the same directory, and renames it to `path` if the block succeeds."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")  # short even if the name is long
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # the original exception matters more
            temporary.unlink(missing_ok=True)


def write_atomic(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file, see `atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(content) if isinstance(content, bytes) else temporary.write_text(content)


def require_new_folder(path: epath.PathLike, replaces: str = "") -> None:
    """Raises UserError if `new_folder` cannot create `path`: it exists and is not to be replaced, or is in a bucket."""
    if is_remote(path):
        raise UserError(f"{os.fspath(path)}: directories are only written locally; copy it to the bucket afterwards")
    if is_there(path) and not (replaces and is_there(epath.Path(path) / replaces)):
        raise UserError(f"{os.fspath(path)}: already exists; choose another name, or delete it")


@contextlib.contextmanager
def new_folder(path: epath.PathLike, replaces: str = "") -> Iterator[pathlib.Path]:
    """Yields a temporary directory beside `path`, and renames it to `path` if the block succeeds.

    An existing directory is replaced if it contains the file `replaces`.

    Raises:
      UserError: `path` exists (and is not to be replaced), is in a bucket or cannot be written.
    """
    require_new_folder(path, replaces)
    folder = pathlib.Path(path)
    temporary, former = (folder.with_name(f".{secrets.token_hex(8)}") for _ in range(2))
    with writing(folder, "nothing was written"):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if replaces and is_there(folder):
                folder.rename(former)
            temporary.rename(folder)
            shutil.rmtree(former, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def storage_error(error: BaseException | None) -> str | None:
    """Returns the storage error in an exception or its causes, such as "No space left on device", or None."""
    for cause in causes(error):
        if isinstance(cause, OSError) and (cause.strerror or type(cause) is not OSError):
            return cause.strerror or str(cause)
        if found := re.search(_REPORTS, str(cause)):
            return found[0]
    return None


@contextlib.contextmanager
def writing(path: epath.PathLike, advice: str) -> Iterator[None]:
    """Turns storage errors in a block that writes to `path` into a `UserError`.

    Raises:
      UserError: names the path and the reason, and ends with the advice.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := storage_error(error)) is None:
            raise
        raise UserError(f"{path}: cannot be written ({reason}); {advice}") from error
