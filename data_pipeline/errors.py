"""The few errors a user, a file or a cluster can cause, each with its exit code."""


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
