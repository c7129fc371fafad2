"""Mistakes of the user's: the command line prints their sentence and exits with status 1, without a traceback."""


class UserError(ValueError):
    """A wrong command, config or file. Its message is for the user: what is wrong, where, and what to do about it."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that the user named is not there."""


class DivergedError(UserError, FloatingPointError):
    """Training has diverged: its loss or gradient is not finite."""
