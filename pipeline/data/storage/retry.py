"""Storage errors: which are transient, how these are retried, and the message that the user gets for each. Retries use
exponential backoff with full jitter, and respect the store's Retry-After. Only time limits them:
`storage.retry_timeout_seconds` applies to one request, and restarts every 16 MiB of a response body.
"""

import errno
import logging
import random
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.config.errors import MomeError, StorageError
from pipeline.config.urls import parse

T = TypeVar("T")
PROGRESS_BYTES = 16 * 2**20  # received bytes that restart the timeout
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds, before jitter
_WARN_AFTER = 5.0  # seconds of failures before the first warning, and between two warnings
_jitter = random.SystemRandom()  # independent of the global generator, and different in forked processes
log = logging.getLogger(__name__)


class NotFound(StorageError):
    """The object, folder or bucket does not exist."""


class ObjectChanged(StorageError):
    """The object's ETag is no longer the expected one."""


class NoSpace(StorageError):
    """The file system or the user's quota is full."""


class StoreFailure(Exception):
    """Failure of a store; `hint` says what the user can do."""

    exit_status = 1  # of the command that it ends: 2 if the URL or the credentials are wrong

    def __init__(self, message: str, hint: str = "Check the URL, and that the store is healthy."):
        super().__init__(message)
        self.hint = hint


class TransientError(StoreFailure):
    """Failure that a retry may resolve."""

    retry_after = 0.0  # seconds to wait that the store requested


class PermanentError(StoreFailure):
    """Failure that a retry would repeat."""


class UnknownSize(PermanentError):
    """The store does not report the object's size."""


class PreconditionFailed(Exception):
    """The object's ETag differs from the expected one."""


class BucketNotFound(FileNotFoundError):
    """The object's bucket does not exist."""


class RetryTimeout(Exception):
    """Transient failures outlasted the retry timeout; the cause is the last of them."""


TOO_SHORT = "it holds {} bytes, and bytes {} to {} were requested"  # the argument of an EOFError
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_PERMANENT_ERRNO = {errno.EINVAL, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS, errno.ELOOP, errno.EFBIG}
_PERMANENT = (MomeError, FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
# TLS failures of a broken connection. All others are permanent: a plain HTTP port, a certificate, a TLS version.
BROKEN_TLS = re.compile(r"EOF|BAD_RECORD_MAC|timed? ?out|reset|shutdown", re.IGNORECASE)
TLS_HINT = (
    "Check that the address (storage.endpoint_url, AWS_ENDPOINT_URL or the URL) has the store's scheme and port: "
    "http:// if the store does not speak TLS. For a custom certificate, set AWS_CA_BUNDLE or SSL_CERT_FILE."
)
# Error -> the class to raise for the user, and the reason; the first match counts.
_REASONS: list[tuple[type[Exception] | tuple[type[Exception], ...], type[StorageError], str]] = [
    (PreconditionFailed, ObjectChanged, "the object was replaced while it was in use. Do not change what a run reads."),
    (EOFError, StorageError, "the object is too short: {error}. It was truncated or replaced; write it again."),
    (BucketNotFound, NotFound, "bucket '{bucket}' does not exist{where}. Create it, or correct the URL."),
    ((FileNotFoundError, NotADirectoryError), NotFound, "it does not exist{where}. Check the URL."),
    (PermissionError, StorageError, "access was denied{where} ({error}). Check the credentials and permissions."),
    (IsADirectoryError, StorageError, "it is a folder, not a file. Pass the URL of a file in it."),
    (UnicodeError, StorageError, "its name has characters that no file or object name can have. Rename it."),
    (StoreFailure, StorageError, "{error}{where}. {error.hint}"),
    (OSError, StorageError, "{name}: {error}. Check the URL, and that it can be reached."),
]


def explain(url: str, action: str, error: BaseException, endpoint: str | None) -> StorageError | None:
    """Return the exception to raise for the user; None if neither the user nor the store caused the error."""
    retries = ""
    if isinstance(error, RetryTimeout) and error.__cause__ is not None:
        retries = f" Gave up after {error}."
        error = error.__cause__
    name, where = type(error).__name__, f" at {endpoint}" if endpoint and url.startswith("s3") else ""
    if isinstance(error, ssl.SSLError) and not BROKEN_TLS.search(str(error)):
        error = PermanentError(f"{name}: {error}", TLS_HINT)
    kind, reason = next(((kind, reason) for kinds, kind, reason in _REASONS if isinstance(error, kinds)), (None, ""))
    if isinstance(error, MomeError) or kind is None:  # already a message for the user, or a bug
        return None
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        kind, reason = NoSpace, "no space left ({error.strerror}). Free some space, or choose another output."
    text = reason.format(error=error, name=name, where=where, bucket=parse(url)[1].partition("/")[0])
    status = error.exit_status if isinstance(error, StoreFailure) else None
    return kind(f"{url}: {action} failed: {text}{retries}", exit_status=status)


@dataclass
class RetryPolicy:
    """Retry policy of one process: the timeout in seconds, and the time of the last warning."""

    timeout: float
    last_warning: float = float("-inf")

    def __call__(self, url: str, request: Callable[[], T]) -> T:
        """Return the result of `request`. Raise its error if permanent, RetryTimeout after the timeout."""
        budget = RetryBudget(self, url)
        while True:
            try:
                return request()
            except Exception as error:
                budget.wait(error)


@dataclass
class RetryBudget:
    """Remaining time for the attempts of one request."""

    policy: RetryPolicy
    url: str
    start: float = field(default_factory=lambda: time.monotonic())
    attempts: int = 0
    failures: int = 0  # in a row, without a byte received

    def wait(self, error: Exception) -> None:
        """Sleep before the next attempt. Raise `error` if it is permanent, RetryTimeout after the timeout."""
        is_transient = isinstance(error, (TransientError, OSError)) and not isinstance(error, _PERMANENT)
        is_permanent_tls = isinstance(error, ssl.SSLError) and not BROKEN_TLS.search(str(error))
        if not is_transient or is_permanent_tls or getattr(error, "errno", None) in _PERMANENT_ERRNO | _NO_SPACE:
            raise error
        self.attempts += 1
        now = time.monotonic()
        elapsed, remaining = now - self.start, self.start + self.policy.timeout - now
        if remaining <= 0:
            raise RetryTimeout(f"{self.attempts} attempts in {elapsed:.0f} s") from error
        if elapsed > _WARN_AFTER and now - self.policy.last_warning >= _WARN_AFTER:
            self.policy.last_warning = now
            log.warning("%s: %s: %s; retrying for %.0f s more", self.url, type(error).__name__, error, remaining)
        # The jitter is added to Retry-After because all clients received the same value.
        retry_after = error.retry_after if isinstance(error, TransientError) else 0.0
        pause = retry_after + _jitter.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(self.failures, 16)))
        time.sleep(min(remaining, pause))  # the last attempt is made at the timeout
        self.failures += 1
