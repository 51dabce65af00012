"""The errors a user can cause, and the exit status each one ends the command with."""

from pipeline.config.redaction import redact


class MomeError(Exception):
    """A failure told to the user in one message: what was given, what was expected, what to do.

    The message holds no secret, whatever the library said whose error it quotes.
    """

    exit_status = 1

    def __init__(self, *arguments: object):
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in arguments))


class ConfigError(MomeError, ValueError):
    """A wrong configuration or command line; nothing was started."""

    exit_status = 2


class DataError(MomeError):
    """Data that training cannot accept: a changed, truncated or missing shard, or too many bad samples."""


class StorageError(MomeError, OSError):
    """An object store or file system that did not answer as it must."""


class CheckpointError(MomeError):
    """A checkpoint that is not whole, was damaged, or does not fit this run."""


class TrackingError(MomeError):
    """A tracking server that could not be reached when a run was to be started."""


class RunFailed(MomeError):
    """A run that stopped for a reason that restarting would only repeat."""


class Superseded(RunFailed):
    """A run that a later start of the same command has taken up: this one must leave it alone, and not be retried."""

    exit_status = 76


class Preempted(MomeError):
    """A run whose machine is about to be taken away: it is saved, and the same command goes on with it."""

    exit_status = 75  # sysexits' EX_TEMPFAIL: the user is invited to try again
