"""Errors that a user can cause, with the exit status of the command."""

from pipeline.config.redaction import redact


class MomeError(Exception):
    """A failure reported in one redacted message: what was given, what was expected, what to do."""

    exit_status = 1

    def __init__(self, *arguments: object, exit_status: int | None = None):
        super().__init__(*(redact(argument) if isinstance(argument, str) else argument for argument in arguments))
        if exit_status is not None:  # of the error of another process, which this one reports
            self.exit_status = exit_status


class ConfigError(MomeError, ValueError):
    """An invalid configuration or command line; nothing was started."""

    exit_status = 2


class DataError(MomeError):
    """Invalid data: a changed, truncated or missing shard, or too many bad samples."""


class StorageError(MomeError, OSError):
    """An unexpected response of an object store or file system."""


class CheckpointError(MomeError):
    """A checkpoint that is incomplete, damaged, or incompatible with this run."""


class TrackingError(MomeError):
    """A tracking server that was unreachable at the start of a run."""


class RunFailed(MomeError):
    """A run that stopped for a reason that a restart would only repeat."""


class Superseded(RunFailed):
    """A run that a later start of the same command has resumed; this process must not write to it or retry."""

    exit_status = 76


class Preempted(MomeError):
    """A run that was checkpointed before the preemption of its machine; the same command resumes it."""

    exit_status = 75  # EX_TEMPFAIL of sysexits: try again later
