"""What can go wrong with a store, in the words of no library: which faults pass, and what the user is told of each."""

from __future__ import annotations

import errno
import re
import ssl

from pipeline.config.errors import MomeError, StorageError
from pipeline.config.urls import parse


class NotFound(StorageError):
    """The object, folder or bucket is not there."""


class ObjectChanged(StorageError):
    """The object is no longer the one whose ETag was known."""


class AlreadyExists(StorageError):
    """The object was to be created, and there is one."""


class NoSpace(StorageError):
    """The file system is full, or the user's quota of it."""


class TransientError(Exception):
    """An answer that may be better next time; `retry_after`: the seconds for which the store asked to be spared."""

    def __init__(self, what: str, retry_after: float = 0.0):
        super().__init__(what)
        self.retry_after = retry_after


class ConnectionFailed(TransientError):
    """No connection to the store could be made."""


class PermanentError(Exception):
    """An answer that will be the same next time; `hint`: what the user can do."""

    def __init__(self, what: str, hint: str = "Check the URL, and that the store is well."):
        super().__init__(what)
        self.hint = hint


class PreconditionFailed(Exception):
    """The object is not the one whose tag was known."""


class ObjectTooShort(EOFError):
    """The object ends before the bytes that were asked for."""

    def __init__(self, size: int, start: int, stop: int):
        super().__init__(f"it holds {size} bytes, and bytes {start} to {stop} were asked for")


class BucketNotFound(FileNotFoundError):
    """The bucket of an object is not there."""


class NoCredentials(PermissionError):
    """None were found, or not all of them."""


class RetryTimeout(Exception):
    """A fault that outlasted the deadline. Its cause is the last one seen."""

    def __init__(self, tries: int, seconds: float):
        super().__init__(f"tried {tries} times in {seconds:.0f} s")
        self.tries, self.seconds = tries, seconds


_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_LASTING_ERRNO = {errno.EINVAL, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS, errno.EDQUOT}
_LASTING_ERRNO |= {errno.ELOOP, errno.EFBIG}
# TLS failures of a connection that broke; all others last: a plain HTTP port, a certificate, an unsupported version.
_BROKEN_TLS = re.compile(r"EOF|BAD_RECORD_MAC|timed? ?out|reset|shutdown", re.IGNORECASE)
TLS_HINT = (
    "Check that the address (storage.endpoint_url, AWS_ENDPOINT_URL or the URL) has the scheme and port of the store: "
    "http:// where it speaks no TLS. For a certificate of your own, set AWS_CA_BUNDLE or SSL_CERT_FILE."
)


def is_broken_tls(error: Exception) -> bool:
    """Return whether a TLS error is one of the connection, which another connection may be spared."""
    return _BROKEN_TLS.search(str(error)) is not None


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, (MomeError, *_LASTING)) or (isinstance(error, ssl.SSLError) and not is_broken_tls(error)):
        return False
    return isinstance(error, TransientError) or (isinstance(error, OSError) and error.errno not in _LASTING_ERRNO)


def explain(url: str, action: str, error: BaseException, endpoint: str | None) -> StorageError | None:
    """The exception to tell the user, or None when it is neither the user's fault nor the store's."""
    tried = ""
    if isinstance(error, RetryTimeout) and error.__cause__ is not None:
        tried = f" Tried {error.tries} times in {error.seconds:.0f} s."
        error = error.__cause__
    told = _reason(url, error, f" at {endpoint}" if endpoint and url.startswith("s3") else "")
    return told and told[0](f"{url}: {action} failed: {told[1]}{tried}")


def _reason(url: str, error: BaseException, where: str) -> tuple[type[StorageError], str] | None:
    match error:
        case MomeError():  # says all already
            return None
        case PreconditionFailed():
            return ObjectChanged, "the object was replaced while it was in use. Do not change what a run reads."
        case EOFError():
            return StorageError, f"the object is too short: {error}. It was cut or replaced; write it again."
        case BucketNotFound():
            bucket = parse(url)[1].partition("/")[0]
            return NotFound, f"bucket '{bucket}' does not exist{where}. Create it, or correct the URL."
        case FileNotFoundError() | NotADirectoryError():
            return NotFound, f"it does not exist{where}. Check the URL."
        case NoCredentials():
            hint = (
                "Set storage.key and storage.secret, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
                "for a public bucket, storage.anonymous: true or AWS_NO_SIGN_REQUEST=YES."
            )
            return StorageError, f"no credentials{where} ({error}). {hint}"
        case PermissionError():
            return StorageError, f"access was denied{where} ({error}). Check the credentials and permissions."
        case ConnectionFailed():
            hint = "Check storage.endpoint_url and that it is running."
            return StorageError, f"the store did not answer{where} ({error}). {hint}"
        case IsADirectoryError():
            return StorageError, "it is a folder, not a file. Give the URL of a file in it."
        case UnicodeError():
            return StorageError, "its name holds characters that no file or object can have. Rename it."
        case ssl.SSLError() if not is_broken_tls(error):
            return StorageError, f"{type(error).__name__}: {error}{where}. {TLS_HINT}"
        case FileExistsError():
            return AlreadyExists, "it exists already."
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return NoSpace, f"no space left ({error.strerror}). Free some, or choose another output."
        case PermanentError():
            return StorageError, f"{error}{where}. {error.hint}"
        case TransientError():
            return StorageError, f"{error}{where}. Check the URL, and that the store is well."
        case OSError():
            return StorageError, f"{type(error).__name__}: {error}. Check the URL, and that it can be reached."
    return None
