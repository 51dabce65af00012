"""Backend-independent storage errors: which are transient, and the user-facing message for each."""

from __future__ import annotations

import errno
import re
import ssl

from pipeline.config.errors import MomeError, StorageError
from pipeline.config.urls import parse


class NotFound(StorageError):
    """The object, folder or bucket does not exist."""


class ObjectChanged(StorageError):
    """The object's ETag is no longer the expected one."""


class NoSpace(StorageError):
    """The file system or the user's quota is full."""


class TransientError(Exception):
    """Failure that a retry may resolve; `retry_after` is the wait in seconds that the store requested."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class ConnectionFailed(TransientError):
    """No connection to the store could be made."""


class PermanentError(Exception):
    """Failure that a retry would repeat; `hint` says what the user can do."""

    def __init__(self, message: str, hint: str = "Check the URL, and that the store is healthy."):
        super().__init__(message)
        self.hint = hint


class PreconditionFailed(Exception):
    """The object's ETag differs from the expected one."""


class ObjectTooShort(EOFError):
    """The object ends before the requested bytes."""

    def __init__(self, size: int, start: int, stop: int):
        super().__init__(f"it holds {size} bytes, and bytes {start} to {stop} were requested")


class BucketNotFound(FileNotFoundError):
    """The object's bucket does not exist."""


class NoCredentials(PermissionError):
    """Credentials are missing or incomplete."""


class RetryTimeout(Exception):
    """Transient failures outlasted the retry timeout; the cause is the last of them."""


_PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_PERMANENT_ERRNO = {errno.EINVAL, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS}
_PERMANENT_ERRNO |= {errno.EDQUOT, errno.ELOOP, errno.EFBIG}
# TLS failures of a broken connection. All others are permanent: a plain HTTP port, a certificate, a TLS version.
_BROKEN_TLS = re.compile(r"EOF|BAD_RECORD_MAC|timed? ?out|reset|shutdown", re.IGNORECASE)
TLS_HINT = (
    "Check that the address (storage.endpoint_url, AWS_ENDPOINT_URL or the URL) has the store's scheme and port: "
    "http:// if the store does not speak TLS. For a custom certificate, set AWS_CA_BUNDLE or SSL_CERT_FILE."
)


def is_broken_tls(error: Exception) -> bool:
    """Return True for a TLS error of a broken connection, which a new connection may avoid."""
    return _BROKEN_TLS.search(str(error)) is not None


def is_transient(error: Exception) -> bool:
    """Return True if the same request may succeed later."""
    if isinstance(error, (MomeError, *_PERMANENT)) or (isinstance(error, ssl.SSLError) and not is_broken_tls(error)):
        return False
    return isinstance(error, TransientError) or (isinstance(error, OSError) and error.errno not in _PERMANENT_ERRNO)


def explain(url: str, action: str, error: BaseException, endpoint: str | None) -> StorageError | None:
    """Return the exception to raise for the user; None if neither the user nor the store caused the error."""
    retries = ""
    if isinstance(error, RetryTimeout) and error.__cause__ is not None:
        retries = f" Gave up after {error}."
        error = error.__cause__
    where = f" at {endpoint}" if endpoint and url.startswith("s3") else ""
    kind: type[StorageError] = StorageError
    match error:
        case MomeError():  # already a message for the user
            return None
        case PreconditionFailed():
            kind = ObjectChanged
            reason = "the object was replaced while it was in use. Do not change what a run reads."
        case EOFError():
            reason = f"the object is too short: {error}. It was truncated or replaced; write it again."
        case BucketNotFound():
            kind, bucket = NotFound, parse(url)[1].partition("/")[0]
            reason = f"bucket '{bucket}' does not exist{where}. Create it, or correct the URL."
        case FileNotFoundError() | NotADirectoryError():
            kind, reason = NotFound, f"it does not exist{where}. Check the URL."
        case NoCredentials():
            reason = (
                f"no credentials{where} ({error}). Set storage.key and storage.secret, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY; for a public bucket, storage.anonymous: true or AWS_NO_SIGN_REQUEST=YES."
            )
        case PermissionError():
            reason = f"access was denied{where} ({error}). Check the credentials and permissions."
        case ConnectionFailed():
            hint = "Check storage.endpoint_url, and that the store is running."
            reason = f"the store did not answer{where} ({error}). {hint}"
        case IsADirectoryError():
            reason = "it is a folder, not a file. Pass the URL of a file in it."
        case UnicodeError():
            reason = "its name has characters that no file or object name can have. Rename it."
        case ssl.SSLError() if not is_broken_tls(error):
            reason = f"{type(error).__name__}: {error}{where}. {TLS_HINT}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            kind = NoSpace
            reason = f"no space left ({error.strerror}). Free some space, or choose another output."
        case PermanentError():
            reason = f"{error}{where}. {error.hint}"
        case TransientError():
            reason = f"{error}{where}. Check the URL, and that the store is healthy."
        case OSError():
            reason = f"{type(error).__name__}: {error}. Check the URL, and that it can be reached."
        case _:
            return None
    return kind(f"{url}: {action} failed: {reason}{retries}")
