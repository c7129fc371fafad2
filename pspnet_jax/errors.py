"""Errors that the user can fix: the command line prints their message and exits with status 1, without a traceback."""

import collections
import errno
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EROFS: "choose a writable directory",
    errno.EIO: "the disk or network file system failed; try again",
    errno.ESTALE: "the network file system failed; try again",
    errno.EMFILE: "raise the limit with `ulimit -n 4096`",
}


class UserError(ValueError):
    """A wrong command, config or file. The message says what is wrong, where, and what to do about it."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that the user named does not exist."""


class DivergedError(UserError, FloatingPointError):
    """Training has diverged: its loss or gradient is not finite."""


def user_message(error: BaseException) -> str:
    """Returns the message that the user gets for an exception, or "" for a bug in this package, which needs its traceback.

    Errors that the user can fix are `UserError`, an unusable file, a full disk, too little memory, and a missing package; or an
    exception that was raised from one of these.
    """
    return _message(error) or (user_message(error.__cause__) if error.__cause__ else "")


def exit_status(program: Callable[[], None]) -> int:
    """Runs a program. Returns 0, 1 after printing the `user_message` of an error, or 130 after Ctrl-C; bugs are raised."""
    try:
        program()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not (sentence := user_message(error)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    return 0


def _message(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in ADVICE):
        return f"{error}; {ADVICE[error.errno]}" if error.errno in ADVICE else str(error)
    if "No space left on device" in str(error):  # TensorFlow and TensorStore do not raise OSError
        return f"{first_line(error)}; {ADVICE[errno.ENOSPC]}"
    if "Too many open files" in str(error):
        return f"too many files are open; {ADVICE[errno.EMFILE]}"
    if "can't start new thread" in str(error):
        return "no more threads can be started; raise the limit on processes (`ulimit -u`) or memory (`ulimit -v`)"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in str(error):
        return f"a name is not valid in the encoding of the locale: {error.object!r}; set LC_ALL=C.UTF-8"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of memory ({first_line(error)}); lower batch_size, the crop or the scales, or set a smaller eval.batch_size"
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("pspnet_jax"):
        return f"{error.name or 'a package'} cannot be imported ({first_line(error)}); run pip install 'pspnet_jax[train]'"
    return ""


def grouped(sentences: Iterable[str]) -> list[str]:
    """Returns one sentence for each fault: the first of those "FILE: FAULT" that differ only in files, sizes and numbers of
    pixels, and their number."""
    first, counts = dict[str, str](), collections.Counter[str]()
    for sentence in sentences:
        fault = re.sub(r"\S*/\S+|\d[\d,]*(?= pixels)|\d+x\d+", "", sentence.partition(": ")[2] or sentence)
        first.setdefault(fault, sentence)
        counts[fault] += 1
    return [s if counts[fault] == 1 else f"{s} (and in {counts[fault] - 1} more files)" for fault, s in first.items()]


def listed(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Returns the first names, and the number of the others."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its type; without tensorstore's details and a long line's middle."""
    text = re.split(r"\n| \[(?:tensorstore_spec|source locations|os_error_code)", str(error).strip())[0]
    line = text or type(error).__name__
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-150:]}"
