"""S3-compatible stores through botocore, whose client signs, finds credentials and regions, and pools connections.

Not through s3fs: its calls take no If-Match, keep nothing of a broken body, and put every byte of a process through
one event loop, whose thread does not survive a fork. Each request is tried again on its own, so that neither a long
listing nor a large upload starts over.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import BadStatusLine, RemoteDisconnected
from time import time
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions as botocore_errors
import botocore.session
import urllib3.exceptions
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.parsers import ResponseParserError

from pipeline.config.errors import ConfigError
from pipeline.config.load import resolve_secret
from pipeline.config.redaction import printable, redact, remember
from pipeline.config.schema import StorageConfig
from pipeline.data.storage.backends import ObjectInfo, PartReader
from pipeline.data.storage.errors import (
    TLS_HINT,
    BucketNotFound,
    ConnectionFailed,
    NoCredentials,
    ObjectTooShort,
    PermanentError,
    PreconditionFailed,
    TransientError,
    is_broken_tls,
)
from pipeline.data.storage.retry import RangeResponse, RetryPolicy, ranged_get

PAGE = 1000  # objects in one listing or deletion
PART = 16 * 2**20  # bytes of one part of a large object: what a fault costs to send again
_REQUESTS_AT_ONCE = 8
_MOST_PARTS = 10_000
_CHUNK = 2**20  # most bytes taken from the socket at once
_STALL = 30.0  # seconds without a byte after which a connection is given up
_CONNECT = 10.0
_CONNECTIONS = 64
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_MOST_IDLE = 10_000  # pages in a row of a listing that name no object
# Answers below 500 that another try may better: throttling, a body that was cut on its way up, a collision.
_PASSING = {408, 409, 429, "RequestTimeout", "SlowDown", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
# Answers of 500 and more that no other try betters: not implemented, HTTP version, log in to the network.
_LASTING = {501, 505, 510, 511, "NotImplemented"}
_REDIRECTS = (301, 302, 303, 307, 308)
_NO_SPACE = re.compile(r"quota|storage_?full|insufficient_?storage|(storage|cap).{0,20}exceeded", re.IGNORECASE)
_HINTS = {
    "RequestTimeTooSkewed": "The clocks of this machine and the store differ. Set this machine's clock (NTP).",
    "ExpiredToken": "The credentials have expired. Renew them.",
    "InvalidToken": "The session token is not valid. Renew the credentials.",
    "TokenRefreshRequired": "The credentials have expired. Renew them.",
    "InvalidObjectState": "The object is archived. Restore it to a storage class that can be read.",
    "AuthorizationHeaderMalformed": "Set AWS_DEFAULT_REGION to the bucket's region.",
    "IllegalLocationConstraintException": "Set AWS_DEFAULT_REGION to the bucket's region.",
}
_MOST_SKEW = 15 * 60  # seconds that a signature may be away from the store's clock
_YES = ("yes", "true", "1")
_ENDPOINT_HINT = "Check storage.endpoint_url (or AWS_ENDPOINT_URL): scheme, host and port."
_KEYS_HINT = "Check storage.key, storage.secret and the AWS_ variables."
# A message that repeats a request's headers is cut before the first.
_HEADER = re.compile(
    r"""[{("'\s]*\b(?:authorization|x-amz-[\w-]+|host|user-agent|accept-encoding|cookie)["']?\s*[:=]\s.*""",
    re.IGNORECASE | re.DOTALL,
)
_MOST_SAID = 300  # characters of a library's or store's message that are repeated


class S3Backend:
    """Paths are bucket/key. Make one in each process, after any fork."""

    def __init__(self, config: StorageConfig, retry: RetryPolicy):
        self._client = _client(config)
        self._retry = retry
        self._deletes_singly = False  # once the store has refused to delete many objects in one request
        self._answered = False  # whether the endpoint has ever spoken HTTP

    def read(self, path: str) -> bytes:
        return ranged_get(lambda *what: self._ask(path, *what), _url(path), 0, None, None, self._retry)

    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes:
        return ranged_get(lambda *what: self._ask(path, *what), _url(path), start, stop, etag, self._retry)

    def info(self, path: str) -> ObjectInfo:
        query = _bucket_key(path)
        return self._info(query, self._request("head_object", **query))

    def is_folder(self, path: str) -> bool:
        bucket, prefix = _bucket_prefix(path)
        return any(_objects(page, prefix) for page in self._pages(1, Bucket=bucket, Prefix=prefix))

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        bucket, prefix = _bucket_prefix(path)
        found: dict[str, ObjectInfo | None] = {}
        for page in self._pages(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            for folder in page.get("CommonPrefixes", []):
                found[_field(folder, "Prefix")[len(prefix) :].rstrip("/")] = None
            for item in _objects(page, prefix):
                name, _, deeper = item["Key"][len(prefix) :].partition("/")
                found[name] = None if deeper else ObjectInfo(_field(item, "Size"), _etag(item))
        found.pop("", None)  # the folder's own marker object
        return found

    def write(self, path: str, data: bytes) -> None:
        self.write_parts(path, len(data), lambda start, stop: data[start:stop])

    def write_parts(self, path: str, size: int, part: PartReader) -> None:
        self._put(path, size, part, {})

    def create_parts(self, path: str, size: int, part: PartReader) -> None:
        try:
            self._put(path, size, part, {"IfNoneMatch": "*"})
        except PreconditionFailed:
            raise FileExistsError(errno.EEXIST, "exists already") from None
        except _Unsupported:  # a store without conditional writes: a look, then the write
            with suppress(FileNotFoundError):
                self.info(path)
                raise FileExistsError(errno.EEXIST, "exists already") from None
            self._put(path, size, part, {})

    def _put(self, path: str, size: int, part: PartReader, condition: dict[str, str]) -> None:
        if size <= PART:
            self._request("put_object", Body=part(0, size), **_bucket_key(path), **condition)
        else:
            self._upload_parts(path, size, part, condition)

    def abandon_uploads(self, path: str, chosen: Callable[[str], bool]) -> int:
        bucket, prefix = _bucket_prefix(path)
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
        count = idle = 0
        while True:
            page = self._request("list_multipart_uploads", **query)
            idle = 0 if page.get("Uploads") else idle + 1
            for found in page.get("Uploads", []):
                upload = {"Key": _field(found, "Key"), "UploadId": _field(found, "UploadId")}
                if not upload["Key"].startswith(prefix) or not chosen(upload["Key"][len(prefix) :]):
                    continue
                with suppress(FileNotFoundError):  # finished or given up meanwhile
                    self._request("abort_multipart_upload", Bucket=bucket, **upload)
                    count += 1
            if not page.get("IsTruncated"):
                return count
            markers = {"KeyMarker": _field(page, "NextKeyMarker"), "UploadIdMarker": _field(page, "NextUploadIdMarker")}
            if markers.items() <= query.items() or idle > _MOST_IDLE:
                raise _lacking("a next page")
            query |= markers

    def upload(self, local: str, path: str) -> None:
        with open(local, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.write_parts(path, size, lambda start, stop: os.pread(file.fileno(), stop - start, start))

    def delete(self, path: str) -> None:
        bucket, prefix = _bucket_prefix(path)
        keys = [prefix.rstrip("/")] if prefix else []
        for page in self._pages(Bucket=bucket, Prefix=prefix):
            keys += [item["Key"] for item in _objects(page, prefix)]
        for first in range(0, len(keys), PAGE):
            self._delete(bucket, keys[first : first + PAGE])

    def _delete(self, bucket: str, keys: list[str]) -> None:
        """Delete objects in one request, or where the store refuses that, in one request each."""
        left = set(keys)
        if len(keys) > 1 and not self._deletes_singly:
            chosen = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            try:
                answer = self._request("delete_objects", Bucket=bucket, Delete=chosen)
                left &= {error.get("Key", "") for error in answer.get("Errors", [])}
            except (PermanentError, PermissionError, FileNotFoundError) as error:
                if isinstance(error, (BucketNotFound, NoCredentials)):
                    raise
                self._deletes_singly = True

        def delete(key: str) -> None:
            with suppress(FileNotFoundError):  # some stores say so of what is not there
                self._request("delete_object", Bucket=bucket, Key=key)

        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            list(pool.map(delete, sorted(left)))

    def _request(self, operation: str, **query: Any) -> dict[str, Any]:
        """One request, until it is answered."""
        url = _url("/".join(filter(None, [query["Bucket"], query.get("Key") or query.get("Prefix")])))
        return self._retry(url, lambda: self._try(operation, **query))

    def _try(self, operation: str, **query: Any) -> dict[str, Any]:
        try:
            answer = getattr(self._client, operation)(**query)
        except PermanentError:  # from `_stop_at_redirect`
            raise
        except Exception as error:
            said = _said(error)
            # A traceback must not show what `_said` has left out either.
            raise _translated(error, said, self._answered) from (error if said == str(error) else None)
        self._answered = True
        return answer

    def _pages(self, most: int = PAGE, **query: Any) -> Iterator[dict[str, Any]]:
        seen: set[str] = set()  # tokens, and the first object of each page: a listing that goes round never ends
        idle = 0
        while True:
            page = self._request("list_objects_v2", MaxKeys=most, **query)
            yield page
            if not page.get("IsTruncated"):
                return
            token = query["ContinuationToken"] = _field(page, "NextContinuationToken")
            first = [f"object {item.get('Key')}" for item in page.get("Contents", [])[:1]]
            idle = 0 if first else idle + 1
            if not seen.isdisjoint([f"token {token}", *first]) or idle > _MOST_IDLE:
                raise _lacking("a next page")
            seen.update([f"token {token}", *first])

    def _info(self, query: dict[str, Any], head: dict[str, Any]) -> ObjectInfo:
        """Return size and ETag from the answer to a HEAD request; one without Content-Length is asked for a listing."""
        if "ContentLength" in head:
            return ObjectInfo(head["ContentLength"], _etag(head))
        page = self._try("list_objects_v2", Bucket=query["Bucket"], Prefix=query["Key"], MaxKeys=1)
        for item in page.get("Contents", []):
            if item.get("Key") == query["Key"]:
                return ObjectInfo(_field(item, "Size"), _etag(head) or _etag(item))
        raise _lacking("Content-Length")

    def _ask(self, path: str, start: int, stop: int | None, etag: str | None) -> RangeResponse:
        query = _bucket_key(path)
        if stop is not None:
            query["Range"] = f"bytes={start}-{stop - 1}"
        if etag is not None:
            query["IfMatch"] = f'"{etag}"'
        try:
            reply = self._try("get_object", **query)
        except _OutOfRange as error:
            raise self._range_error(path, start, stop, etag) or TransientError(str(error)) from error
        try:
            found = _etag(reply)
            if etag is not None and found not in (etag, None):
                raise PreconditionFailed()  # a store that overlooks If-Match
            if etag is not None and found is None and stop is not None and "ContentRange" not in reply:
                raise TransientError(f"no bytes {start} to {stop} came, and nothing says that they are of the object")
            skipped, length = self._extent(query, reply, start, stop)
        except BaseException:
            reply["Body"].close()
            raise
        exactly = "ContentLength" not in reply and (stop is None or "ContentRange" in reply)
        return RangeResponse(start + length, found, _pieces(reply["Body"], skipped, length, exactly))

    def _extent(self, query: dict[str, Any], reply: dict[str, Any], start: int, stop: int | None) -> tuple[int, int]:
        """Return how many bytes of an answer come before those asked for, and how many are these."""
        length, place = reply.get("ContentLength"), _CONTENT_RANGE.fullmatch(reply.get("ContentRange", ""))
        if place is None and reply["ResponseMetadata"]["HTTPStatusCode"] == 206:
            raise TransientError(f"{length} bytes of no stated range came for bytes {start} to {stop}")
        if place is None:  # the whole object: asked for, or from a store that serves no ranges
            if length is None:
                length = self._info(query, self._try("head_object", **query)).size
            if stop is not None and length < stop:
                raise ObjectTooShort(length, start, stop)
            return start, (length if stop is None else stop) - start
        first, last, size = map(int, place.groups())
        if stop is None:
            raise TransientError(f"bytes {first} to {last + 1} came for the whole object")
        if size < stop:
            raise ObjectTooShort(size, start, stop)
        if (first, last + 1) != (start, stop) or length not in (stop - start, None):
            raise TransientError(f"{length} bytes, said to be {first} to {last + 1}, came for bytes {start} to {stop}")
        return 0, stop - start

    def _range_error(self, path: str, start: int, stop: int | None, etag: str | None) -> Exception | None:
        """What a store that judges the range before the condition did not say."""
        query = _bucket_key(path)
        info = self._info(query, self._try("head_object", **query))
        if etag is not None and info.etag not in (etag, None):
            return PreconditionFailed()
        return ObjectTooShort(info.size, start, stop) if stop is not None and info.size < stop else None

    def _upload_parts(self, path: str, size: int, part: PartReader, condition: dict[str, str]) -> None:
        """A multipart upload: nothing is seen of it before it is complete."""
        key, length = _bucket_key(path), max(PART, -(-size // _MOST_PARTS))
        key["UploadId"] = _field(self._request("create_multipart_upload", **key), "UploadId")

        def send(number: int) -> dict[str, Any]:
            body = part((number - 1) * length, min(number * length, size))
            answer = self._request("upload_part", PartNumber=number, Body=body, **key)
            return {"PartNumber": number, "ETag": _field(answer, "ETag")}

        def complete() -> None:
            try:
                self._try("complete_multipart_upload", MultipartUpload={"Parts": parts}, **key, **condition)
            except BucketNotFound:
                raise
            except FileNotFoundError as error:  # an earlier try may have done it, and its answer been lost
                if not self._is_made_of(path, size, parts, part, length):
                    raise PermanentError(
                        "the upload was removed before it was complete",
                        "Another process took up this run, or the store removes unfinished uploads too early.",
                    ) from error

        try:
            with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, -(-size // length) + 1)))
            self._retry(_url(path), complete)
        except BaseException:
            with suppress(Exception):
                self._try("abort_multipart_upload", **key)
            raise

    def _is_made_of(self, path: str, size: int, parts: list[dict[str, Any]], part: PartReader, length: int) -> bool:
        """Return whether an object holds what an upload's parts hold, by its ETag or else by reading it."""
        try:
            info = self.info(path)
        except FileNotFoundError:
            return False
        if info.size != size or info.etag == _etag_of_parts(parts):
            return info.size == size
        ranges = ((start, min(start + length, size)) for start in range(0, size, length))
        return all(self.read_range(path, *each, info.etag) == part(*each) for each in ranges)


class _OutOfRange(Exception):
    """Status 416."""


class _Unsupported(PermanentError):
    """The store does not know a request, or a header that was sent."""


def _client(config: StorageConfig) -> Any:
    options: dict[str, Any] = {
        "connect_timeout": min(_CONNECT, config.deadline_seconds / 4),
        "read_timeout": min(_STALL, config.deadline_seconds / 4),
        "retries": {"total_max_attempts": 1},  # `RetryPolicy` does it
        "max_pool_connections": _CONNECTIONS,
        "tcp_keepalive": True,
        # Stores other than AWS reject the newer checksum trailers, and most want the bucket in the path.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    for name, value in os.environ.items():
        if name.startswith("AWS_") and not value.isprintable():
            raise ConfigError(
                f"storage: the environment variable {name} holds a line break or another control character. "
                "Set it again without; a file of variables with Windows line endings gives such values"
            )
    if config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
        options["s3"] = {"addressing_style": "path"}
    if config.anonymous or (os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in _YES and not config.key):
        options["signature_version"] = UNSIGNED
    key, secret = resolve_secret(config.key), resolve_secret(config.secret)
    session = botocore.session.get_session()
    try:
        if config.endpoint_url is not None:
            _check_endpoint(config.endpoint_url)
        client = session.create_client(
            "s3",
            endpoint_url=config.endpoint_url,
            config=Config(**options),
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )
        _check_endpoint(client.meta.endpoint_url)
    except (botocore_errors.BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"storage: no S3 client can be made: {error}. "
            "Check storage.endpoint_url (http://host:port), storage.key and storage.secret, and the AWS_ variables"
        ) from error
    client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
    client.meta.events.register("before-parse.s3.ListObjectsV2", _check_listing)
    if "amazonaws" not in client.meta.endpoint_url:
        client.meta.events.register("response-received.s3", _stop_at_redirect)
    found = None if key or "signature_version" in options else session.get_credentials()
    if found and type(found) is Credentials:
        for value in filter(None, (found.access_key, found.secret_key, found.token)):
            remember(value)
    return client


def _check_endpoint(url: str) -> None:
    """Raise ValueError for what is no address of a store."""
    address = urlsplit(url)
    if address.username is not None:
        raise ValueError("the endpoint holds a user name, which S3 does not use; leave out what precedes the host")
    if address.scheme not in ("http", "https") or not address.hostname or address.port == 0:
        raise ValueError(f"expected http://host:port, got {url!r}")


def _stop_at_redirect(parsed_response: dict[str, Any] | None, **_: Any) -> None:
    """Raise for a redirect that names no region: botocore would ask about the bucket, and be redirected, for ever."""
    answer = parsed_response or {}
    meta = answer.get("ResponseMetadata", {})
    status, headers = meta.get("HTTPStatusCode"), meta.get("HTTPHeaders", {})
    if status in _REDIRECTS and not (headers.get("x-amz-bucket-region") or answer.get("Error", {}).get("Region")):
        raise _redirected(status, headers)


def _redirected(status: int, headers: dict[str, str]) -> PermanentError:
    target = urlsplit(headers.get("location", ""))
    if not target.hostname:
        return PermanentError(f"the store answers with a redirect ({status}) to nowhere", _ENDPOINT_HINT)
    port = f":{target.port}" if target.port else ""
    place = f"{target.scheme}://{target.hostname}{port}"
    hint = f"If that is the store's own address, set storage.endpoint_url (or AWS_ENDPOINT_URL) to {place}."
    return PermanentError(f"the store answers with a redirect ({status}) to {place}", hint)


def _check_listing(response_dict: dict[str, Any], **_: Any) -> None:
    """Make a fault of a page by a proxy, or of nothing: botocore would read an empty folder from it."""
    if response_dict["status_code"] == 200 and b"ListBucketResult" not in response_dict["body"]:
        response_dict["status_code"] = 500


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """Stores other than AWS demand this header, which botocore no longer sends."""
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _pieces(body: Any, skipped: int, length: int, exactly: bool) -> Generator[bytes, None, None]:
    """Yield `length` bytes of a body after `skipped`, as the socket has them: what came before a fault is never lost.

    `exactly`: the body must end with them.
    """
    with body as raw:
        try:
            while skipped + length:
                piece = raw.read1(min(skipped + length, _CHUNK))
                if not piece:
                    return
                piece, skipped = piece[skipped:], max(0, skipped - len(piece))
                length -= len(piece)
                yield piece
            if exactly and raw.read1(1):
                raise TransientError("more bytes came than the object holds")
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error


def _objects(page: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """Return the objects of a listing's page; a store that overlooks `prefix` must not widen a deletion."""
    return [item for item in page.get("Contents", []) if _field(item, "Key").startswith(prefix)]


def _field(answer: dict[str, Any], name: str) -> Any:
    """Return what an answer must hold."""
    if answer.get(name) is None:
        raise _lacking(name)
    return answer[name]


def _lacking(name: str) -> PermanentError:
    return PermanentError(
        f"the store's answer lacks {name}", "Check that no proxy between here and the store removes it."
    )


def _etag(answer: dict[str, Any]) -> str | None:
    return (answer.get("ETag") or "").strip('"') or None


def _etag_of_parts(parts: list[dict[str, Any]]) -> str | None:
    """Return the ETag of the object that these parts make; None where theirs are no MD5 digests."""
    try:
        digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    except ValueError:
        return None
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"


def _said(error: Exception) -> str:
    """Return what an error says, in one short line without keys and headers."""
    text = _HEADER.split(" ".join(printable(redact(str(error))).split()), maxsplit=1)[0].rstrip(" .")
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}…"


def _translated(error: Exception, said: str, answered: bool) -> Exception:
    """Return a failure of botocore in the words of `faults`; `answered`: the endpoint is known to speak HTTP."""
    inner = getattr(error, "kwargs", {}).get("error")
    named = f"{type(error).__name__}: {said}"
    match error:
        case botocore_errors.ClientError():
            return _refusal(error, said)
        case botocore_errors.NoCredentialsError() | botocore_errors.PartialCredentialsError():
            return NoCredentials(said)
        case botocore_errors.EndpointConnectionError() | botocore_errors.ConnectTimeoutError():
            return ConnectionFailed(said)
        case botocore_errors.SSLError():
            return TransientError(named) if is_broken_tls(error) else PermanentError(named, TLS_HINT)
        case RecursionError():
            return PermanentError("the store's redirects lead round in circles", _ENDPOINT_HINT)
        case botocore_errors.ConnectionClosedError() if not answered and _is_other_protocol(inner):
            return PermanentError("the endpoint does not answer in HTTP", _ENDPOINT_HINT)
        case botocore_errors.HTTPClientError() if "Invalid header value" in str(error):
            return PermanentError("a key, token or region holds a line break or another control character", _KEYS_HINT)
        case botocore_errors.HTTPClientError() if isinstance(inner, (ValueError, TypeError, LookupError)):
            return PermanentError(named, _ENDPOINT_HINT)  # nothing was sent
        case UnicodeError():
            return PermanentError("a key, token or region holds a character that no header can", _KEYS_HINT)
        case (
            ResponseParserError()  # throttling proxies answer with pages that are no XML
            | botocore_errors.HTTPClientError()
            | botocore_errors.ConnectionError()
            | botocore_errors.CredentialRetrievalError()
            | botocore_errors.MetadataRetrievalError()
            | urllib3.exceptions.HTTPError()  # from the body of an error
            | OSError()
        ):
            return TransientError(named)
    return PermanentError(named)


def _is_other_protocol(error: object) -> bool:
    """Return whether the first bytes from a port were no HTTP: TLS, SSH, a database."""
    inner = error.args[-1] if isinstance(error, urllib3.exceptions.ProtocolError) and error.args else None
    return isinstance(inner, BadStatusLine) and not isinstance(inner, RemoteDisconnected)


def _refusal(error: botocore_errors.ClientError, said: str) -> Exception:
    answer = error.response.get("Error", {})
    code = str(answer.get("Code", ""))
    meta = error.response.get("ResponseMetadata", {})
    status, headers = int(meta.get("HTTPStatusCode", 0)), meta.get("HTTPHeaders", {})
    if code == "NoSuchBucket":
        return BucketNotFound(errno.ENOENT, said)
    if status == 404:
        return FileNotFoundError(errno.ENOENT, said)
    if status == 412:
        return PreconditionFailed()
    if status == 416:
        return _OutOfRange(said)
    if status in _REDIRECTS:
        return _redirected(status, headers)
    if {status, code} & _PASSING:
        return TransientError(said, _retry_after(headers))
    if status == 507 or (status < 500 and _NO_SPACE.search(f"{code} {answer.get('Message')}")):
        return OSError(errno.EDQUOT, said)
    if not 300 <= status < 500 and not {status, code} & _LASTING:
        return TransientError(said, _retry_after(headers))
    if status == 403 and code in ("", "403", "AccessDenied", "SignatureDoesNotMatch") and _skew(headers) > _MOST_SKEW:
        code = "RequestTimeTooSkewed"  # that an answer to HEAD has no body to say
    if code in _HINTS:
        return PermanentError(said, _HINTS[code])
    if status in (401, 403):
        return PermissionError(errno.EACCES, said)
    return (_Unsupported if status in (400, 405, 501) or code == "NotImplemented" else PermanentError)(said)


def _skew(headers: dict[str, str]) -> float:
    """Return how many seconds the store's clock and ours are apart; 0 when it does not tell the time."""
    with suppress(ValueError, TypeError, OverflowError):
        return abs(parsedate_to_datetime(headers["date"]).timestamp() - time()) if "date" in headers else 0.0
    return 0.0


def _retry_after(headers: dict[str, str]) -> float:
    """Seconds, from either form of the header; 0 without one."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    return 0.0


def _url(path: str) -> str:
    return f"s3://{path}"


def _bucket_key(path: str) -> dict[str, Any]:
    bucket, _, key = path.partition("/")
    if not key:
        raise FileNotFoundError(errno.ENOENT, "a bucket holds no bytes itself; name an object in it")
    return {"Bucket": bucket, "Key": key}


def _bucket_prefix(path: str) -> tuple[str, str]:
    """The bucket, and how the keys of what lies in a folder begin."""
    bucket, _, key = path.partition("/")
    return bucket, key.rstrip("/") + "/" if key else ""
