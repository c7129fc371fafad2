"""Mistakes of the user's: the command line prints their sentence and exits with status 1, without a traceback."""

import errno

ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EIO: "the disk or network file system failed; try again",
    errno.ESTALE: "the network file system failed; try again",
    errno.EMFILE: "raise the limit with `ulimit -n 4096`",
}


class UserError(ValueError):
    """A wrong command, config or file. Its message is for the user: what is wrong, where, and what to do about it."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that the user named is not there."""


class DivergedError(UserError, FloatingPointError):
    """Training has diverged: its loss or gradient is not finite."""


def sentence(error: BaseException) -> str:
    """Returns what to tell the user about an exception, or "" if it is a bug of ours, whose traceback is wanted.

    Beside a `UserError` these are: a file that cannot be used, a full disk, too little memory, a package that is not installed;
    also where another exception was raised from them.
    """
    return _sentence(error) or (sentence(error.__cause__) if error.__cause__ else "")


def _sentence(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in ADVICE):
        return f"{error}; {ADVICE[error.errno]}" if error.errno in ADVICE else str(error)
    if "No space left on device" in str(error):  # TensorFlow's errors and TensorStore's are no OSErrors
        return f"{_first_line(error)}; {ADVICE[errno.ENOSPC]}"
    if "Too many open files" in str(error):
        return f"too many files are open; {ADVICE[errno.EMFILE]}"
    if "can't start new thread" in str(error):
        return "no further thread can be started; raise the limit of processes or of memory, see `ulimit -u` and `ulimit -v`"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in str(error):
        return f"a name is not in the encoding that the locale sets: {error.object!r}; set LC_ALL=C.UTF-8"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory ({_first_line(error)}); lower batch_size, eval.batch_size, the crop or the scales"
    if isinstance(error, ImportError) and not (error.name or "").startswith("pspnet_jax"):
        return f"{error.name or 'a package'} cannot be imported ({_first_line(error)}); run pip install -r requirements.txt"
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
