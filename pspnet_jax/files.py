"""Paths, local and gs://, writing a file so that a killed process never leaves half of it, and what storage reports."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator

from etils import epath

from pspnet_jax.errors import MissingFileError, UserError

# What storage has to do with the user, as the libraries that write files quote it in errors of their own.
_FULL_OR_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
_REPORTS = "|".join(os.strerror(number) for number in _FULL_OR_CLOSED + _AWAY)


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is that of a bucket, such as gs://bucket/run."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path without "~" and relative parts; a remote one, such as gs://bucket/run, as it is.

    Raises:
      UserError: it is on storage of another kind.
    """
    text = os.fspath(path).removeprefix("file://")
    if is_remote(text):
        if not text.startswith("gs://"):
            raise UserError(f"{text}: cannot be read or written here; expected a local path, or one in a bucket, gs://...")
        return epath.Path(path)
    try:
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    except FileNotFoundError as error:
        raise UserError("the current directory is gone; go to one that is there, with cd") from error


def given(path: epath.PathLike) -> epath.Path:
    """`absolute` of a path that the user has given; a bucket that is not there is told at once.

    TensorFlow would try again for minutes.

    Raises:
      UserError: says what is missing: the bucket, the right to read it, or orbax's client.
    """
    found = absolute(path)
    if not os.fspath(found).startswith("gs://"):
        return found
    bucket = "/".join(os.fspath(found).split("/")[:3])
    try:
        import google.cloud.storage  # noqa: F401 -- orbax's
    except ImportError as error:
        raise UserError(f"{found}: gs:// needs one package more: pip install google-cloud-storage") from error
    try:
        exists = epath.Path(bucket).exists()
    except Exception as error:  # TensorFlow's: no permission, no credentials, no connection
        raise UserError(f"{found}: {bucket} cannot be read ({str(error).splitlines()[0]})") from error
    if not exists:
        raise MissingFileError(f"{found}: there is no bucket {bucket}")
    return found


def is_there(path: epath.PathLike) -> bool:
    """Whether something is at the path. `exists` says no, too, where storage does not answer.

    Raises:
      OSError: storage does not answer.
    """
    if is_remote(path):
        return epath.Path(path).exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


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
        with contextlib.suppress(OSError):  # what is wrong was said by the line before
            temporary.unlink(missing_ok=True)


def storage_error(error: BaseException | None) -> str | None:
    """What the disk or the network reports in an exception, or in one that caused it: "No space left on device"; else None."""
    while error is not None:
        if isinstance(error, OSError) and (error.strerror or type(error) is not OSError):
            return error.strerror or str(error)
        if found := re.search(_REPORTS, str(error)):
            return found[0]
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def writing(path: epath.PathLike, cure: str) -> Iterator[None]:
    """Turns what storage reports while the block writes to `path` into a sentence of the user's.

    Raises:
      UserError: names the path, the reason and the cure.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := storage_error(error)) is None:
            raise
        raise UserError(f"{path}: cannot be written ({reason}); {cure}") from error
