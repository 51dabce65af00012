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
from time import time
from typing import Any

import botocore.exceptions as botocore_errors
import botocore.session
import urllib3.exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError

from pipeline.config.errors import ConfigError
from pipeline.config.load import resolve_secret
from pipeline.config.schema import StorageConfig
from pipeline.data.storage.backend import ObjectInfo, Part
from pipeline.data.storage.faults import (
    Changed,
    Fault,
    NoBucket,
    NoCredentials,
    Refused,
    TooShort,
    Unreachable,
)
from pipeline.data.storage.receive import Answer, receive
from pipeline.data.storage.retry import Retry

PAGE = 1000  # objects in one listing or deletion
PART = 16 * 2**20  # bytes of one part of a large object: what a fault costs to send again
_PARTS_AT_ONCE = 8
_MOST_PARTS = 10_000
_CHUNK = 2**20  # most bytes taken from the socket at once
_STALL = 30.0  # seconds without a byte after which a connection is given up
_CONNECT = 10.0
_CONNECTIONS = 64
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_LIBRARIES = (
    botocore_errors.ClientError,
    botocore_errors.BotoCoreError,
    ResponseParserError,  # throttling proxies answer with pages that are no XML
    urllib3.exceptions.HTTPError,  # from the body of an error
)
# Answers below 500 that another try may better: throttling, a body that was cut on its way up, a collision.
_PASSING = {408, 409, 429, "RequestTimeout", "SlowDown", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}


class S3:
    """Paths are bucket/key. Make one in each process, after any fork."""

    def __init__(self, config: StorageConfig, retry: Retry):
        self._client = _client(config)
        self._retry = retry

    def read(self, path: str) -> bytes:
        return receive(lambda *what: self._ask(path, *what), _url(path), 0, None, None, self._retry)

    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes:
        return receive(lambda *what: self._ask(path, *what), _url(path), start, stop, etag, self._retry)

    def info(self, path: str) -> ObjectInfo:
        return _info(self._request("head_object", **_bucket_key(path)))

    def is_folder(self, path: str) -> bool:
        bucket, prefix = _bucket_prefix(path)
        return bool(self._request("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"))

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        bucket, prefix = _bucket_prefix(path)
        found: dict[str, ObjectInfo | None] = {}
        for page in self._pages(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            for folder in page.get("CommonPrefixes", []):
                found[folder["Prefix"][len(prefix) :].rstrip("/")] = None
            for item in page.get("Contents", []):
                found[item["Key"][len(prefix) :]] = ObjectInfo(item["Size"], item["ETag"].strip('"'))
        found.pop("", None)  # the folder's own marker object
        return found

    def write(self, path: str, data: bytes) -> None:
        self.write_parts(path, len(data), lambda start, stop: data[start:stop])

    def write_parts(self, path: str, size: int, part: Part) -> None:
        self._put(path, size, part, {})

    def create_parts(self, path: str, size: int, part: Part) -> None:
        try:
            self._put(path, size, part, {"IfNoneMatch": "*"})
        except Changed:
            raise FileExistsError(errno.EEXIST, "exists already") from None
        except _NotImplemented:  # a store without conditional writes: a look, then the write
            with suppress(FileNotFoundError):
                self.info(path)
                raise FileExistsError(errno.EEXIST, "exists already") from None
            self._put(path, size, part, {})

    def _put(self, path: str, size: int, part: Part, condition: dict[str, str]) -> None:
        if size <= PART:
            self._request("put_object", Body=part(0, size), **_bucket_key(path), **condition)
        else:
            self._upload_parts(path, size, part, condition)

    def abandon_uploads(self, path: str, chosen: Callable[[str], bool]) -> int:
        bucket, prefix = _bucket_prefix(path)
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
        count = 0
        while True:
            page = self._request("list_multipart_uploads", **query)
            for found in page.get("Uploads", []):
                if not chosen(found["Key"][len(prefix) :]):
                    continue
                with suppress(FileNotFoundError):  # finished or given up meanwhile
                    self._request("abort_multipart_upload", Bucket=bucket, Key=found["Key"], UploadId=found["UploadId"])
                    count += 1
            if not page.get("IsTruncated"):
                return count
            query |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def upload(self, local: str, path: str) -> None:
        with open(local, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.write_parts(path, size, lambda start, stop: os.pread(file.fileno(), stop - start, start))

    def delete(self, path: str) -> None:
        bucket, prefix = _bucket_prefix(path)
        keys = [prefix.rstrip("/")] if prefix else []
        for page in self._pages(Bucket=bucket, Prefix=prefix):
            keys += [item["Key"] for item in page.get("Contents", [])]
        for first in range(0, len(keys), PAGE):
            chosen = [{"Key": key} for key in keys[first : first + PAGE]]
            answer = self._request("delete_objects", Bucket=bucket, Delete={"Objects": chosen, "Quiet": True})
            if errors := answer.get("Errors"):
                raise Fault(f"{len(errors)} objects stayed, the first: {errors[0]}")

    def _request(self, operation: str, **query: Any) -> dict[str, Any]:
        """One request, until it is answered."""
        url = _url("/".join(filter(None, [query["Bucket"], query.get("Key") or query.get("Prefix")])))
        return self._retry(url, lambda: self._try(operation, **query))

    def _try(self, operation: str, **query: Any) -> dict[str, Any]:
        try:
            return getattr(self._client, operation)(**query)
        except _LIBRARIES as error:
            raise _translated(error) from error

    def _pages(self, **query: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = self._request("list_objects_v2", MaxKeys=PAGE, **query)
            yield page
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    def _ask(self, path: str, start: int, stop: int | None, etag: str | None) -> Answer:
        query = _bucket_key(path)
        if stop is not None:
            query["Range"] = f"bytes={start}-{stop - 1}"
        if etag is not None:
            query["IfMatch"] = f'"{etag}"'
        try:
            reply = self._try("get_object", **query)
        except _OutOfRange as error:
            raise self._why_out_of_range(path, start, stop, etag) or Fault(str(error)) from error
        try:
            found = reply.get("ETag", "").strip('"') or None
            if etag is not None and found not in (etag, None):
                raise Changed()  # a store that overlooks If-Match
            stop = reply["ContentLength"] if stop is None else _checked_stop(reply, start, stop)
        except BaseException:
            reply["Body"].close()
            raise
        return Answer(stop, found, _pieces(reply["Body"], stop - start))

    def _why_out_of_range(self, path: str, start: int, stop: int | None, etag: str | None) -> Exception | None:
        """What a store that judges the range before the condition did not say."""
        info = _info(self._try("head_object", **_bucket_key(path)))
        if etag is not None and info.etag != etag:
            return Changed()
        return TooShort(info.size, start, stop) if stop is not None and info.size < stop else None

    def _upload_parts(self, path: str, size: int, part: Part, condition: dict[str, str]) -> None:
        """A multipart upload: nothing is seen of it before it is complete."""
        key, length = _bucket_key(path), max(PART, -(-size // _MOST_PARTS))
        key["UploadId"] = self._request("create_multipart_upload", **key)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            body = part((number - 1) * length, min(number * length, size))
            return {
                "PartNumber": number,
                "ETag": self._request("upload_part", PartNumber=number, Body=body, **key)["ETag"],
            }

        def complete() -> None:
            try:
                self._try("complete_multipart_upload", MultipartUpload={"Parts": parts}, **key, **condition)
            except FileNotFoundError:  # an earlier try may have done it, and its answer been lost
                if self.info(path).size != size:
                    raise

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, -(-size // length) + 1)))
            self._retry(_url(path), complete)
        except BaseException:
            with suppress(Exception):
                self._try("abort_multipart_upload", **key)
            raise


class _OutOfRange(Exception):
    """Status 416."""


class _NotImplemented(Refused):
    """Status 501: the store does not know a header that was sent."""


def _client(config: StorageConfig) -> Any:
    options: dict[str, Any] = {
        "connect_timeout": min(_CONNECT, config.deadline_seconds / 4),
        "read_timeout": min(_STALL, config.deadline_seconds / 4),
        "retries": {"total_max_attempts": 1},  # `Retry` does it
        "max_pool_connections": _CONNECTIONS,
        "tcp_keepalive": True,
        # Stores other than AWS reject the newer checksum trailers, and most want the bucket in the path.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
        options["s3"] = {"addressing_style": "path"}
    secrets = {"aws_access_key_id": resolve_secret(config.key), "aws_secret_access_key": resolve_secret(config.secret)}
    try:
        client = botocore.session.get_session().create_client(
            "s3", endpoint_url=config.endpoint_url, config=Config(**options), **secrets
        )
    except (botocore_errors.BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"storage: no S3 client can be made: {error}. "
            "Check storage.endpoint_url (http://host:port), storage.key and storage.secret, and the AWS_ variables"
        ) from error
    client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
    return client


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """Stores other than AWS demand this header, which botocore no longer sends."""
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _pieces(body: Any, length: int) -> Generator[bytes, None, None]:
    """`length` bytes of a body, as the socket has them: what came before a fault is never lost."""
    with body as raw:
        try:
            while length:
                piece = raw.read1(min(length, _CHUNK))
                if not piece:
                    return
                length -= len(piece)
                yield piece
        except urllib3.exceptions.HTTPError as error:
            raise Fault(f"{type(error).__name__}: {error}") from error


def _checked_stop(reply: dict[str, Any], start: int, stop: int) -> int:
    """`stop`, when the answer is exactly the range asked for."""
    length, place = reply["ContentLength"], _CONTENT_RANGE.fullmatch(reply.get("ContentRange", ""))
    if place is None:
        if (start, stop) == (0, length):  # a store may send a whole object plainly
            return stop
        raise Fault(f"{length} bytes of no stated range came for bytes {start} to {stop}")
    first, last, size = map(int, place.groups())
    if size < stop:
        raise TooShort(size, start, stop)
    if (first, last + 1, length) != (start, stop, stop - start):
        raise Fault(f"{length} bytes, said to be {first} to {last + 1}, came for bytes {start} to {stop}")
    return stop


def _translated(error: Exception) -> Exception:
    """A failure of botocore in the words of `faults`."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, botocore_errors.ClientError):
        return _refusal(error)
    if isinstance(error, (botocore_errors.NoCredentialsError, botocore_errors.PartialCredentialsError)):
        return NoCredentials(str(error))
    if isinstance(error, (botocore_errors.EndpointConnectionError, botocore_errors.ConnectTimeoutError)):
        return Unreachable(str(error))
    if isinstance(error, botocore_errors.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Refused(said)
    passing = (
        botocore_errors.HTTPClientError,
        botocore_errors.ConnectionError,
        botocore_errors.CredentialRetrievalError,
        botocore_errors.MetadataRetrievalError,
        ResponseParserError,
        urllib3.exceptions.HTTPError,
    )
    return (Fault if isinstance(error, passing) else Refused)(said)


def _refusal(error: botocore_errors.ClientError) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    meta = error.response.get("ResponseMetadata", {})
    status = int(meta.get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return NoBucket(errno.ENOENT, str(error))
    if status == 404:
        return FileNotFoundError(errno.ENOENT, str(error))
    if status == 412:
        return Changed()
    if status == 416:
        return _OutOfRange(str(error))
    if status == 501 or code == "NotImplemented":
        return _NotImplemented(str(error))
    if {status, code} & _PASSING or not 300 <= status < 500:
        return Fault(str(error), _retry_after(meta.get("HTTPHeaders", {})))
    if status in (401, 403):
        return PermissionError(errno.EACCES, str(error))
    return Refused(str(error))


def _retry_after(headers: dict[str, str]) -> float:
    """Seconds, from either form of the header; 0 without one."""
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    return 0.0


def _info(head: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(head["ContentLength"], head["ETag"].strip('"'))


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
