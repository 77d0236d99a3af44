"""The few errors a user, a file or a cluster can cause, each with its exit code."""

import errno

INTERRUPTED = 130  # by whoever watched: no failure of the program
# A disk's refusals, which the system tells of without the name of a file.
OF_DISKS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE})


class UserError(Exception):
    """An error with a remedy; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2
    rank: int | None = None  # where it happened, once ranks have told each other


class ConfigError(UserError):
    """A recipe, or two things that do not belong together."""

    exit_code = 78


class InputMissing(UserError):
    """A file, folder or object that should be there and is not."""

    exit_code = 66


class DataError(UserError):
    """Data that is damaged, or too much of it."""

    exit_code = 65


class NotWanted(DataError):
    """Media that is whole, but of a kind that is not taken: its rate, brightness, length, ..."""


class StorageError(UserError):
    """A disk or object store that does not do its part."""

    exit_code = 74


class NumericError(UserError):
    """Training left the finite numbers."""

    exit_code = 70


class NodeUnfit(UserError):
    """A node that cannot do what was promised of it, and that a job should avoid."""

    exit_code = 69


class RunLocked(UserError):
    """Another live process owns the run folder."""

    exit_code = 73


def exit_code_of(error: BaseException) -> int:
    """What a process ends with that dies of an error; 1 where the program is at fault."""
    match error:
        case UserError():
            return error.exit_code
        case KeyboardInterrupt():
            return INTERRUPTED
        case FileNotFoundError() | IsADirectoryError() | NotADirectoryError() if error.filename:
            return InputMissing.exit_code
        case OSError() if error.filename or error.errno in OF_DISKS:
            return StorageError.exit_code
    return 1
