"""Files by URL: local folders, S3-compatible stores and whatever else fsspec reaches, behind one small interface.

The only module that imports fsspec, s3fs and botocore, and only when a remote URL is first used. Transient faults are
retried with exponential backoff, full jitter and a total deadline; what is missing or forbidden fails at once. Every
failure is a StorageError that names the URL and says what to do.

s3fs is used for its connection and credentials; requests go through its client one by one, because its own file
calls take no If-Match, list through a cache, and retry on their own terms.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from pipeline.config.errors import StorageError
from pipeline.config.load import resolve_secret
from pipeline.config.paths import is_local
from pipeline.config.schema import StorageConfig

T = TypeVar("T")
PIECE = 16 * 2**20  # bytes of one request when a whole object is streamed
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 20.0  # seconds
_jitter = random.SystemRandom()  # never the global generator, and different in forked processes


class NotFound(StorageError):
    """The object, folder or bucket is not there."""


class ObjectChanged(StorageError):
    """The object is no longer the one whose ETag was known."""


class _Transient(Exception):
    """An answer that may be better next time, such as a body cut short."""


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, and a tag that changes with the content (ETag; for local files time and size)."""

    size: int
    etag: str | None


def join(url: str, *parts: str) -> str:
    """The URL of something inside the folder `url`."""
    return "/".join([url.rstrip("/") or "", *(part.strip("/") for part in parts)])


def split(url: str) -> tuple[str, str]:
    """The folder of a URL and the name inside it."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name


class _Backend(Protocol):
    """Plain attempts at one operation; paths are the backend's own. `Storage` retries and words the failures."""

    def read(self, path: str) -> bytes: ...
    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes: ...
    def info(self, path: str) -> ObjectInfo: ...
    def is_folder(self, path: str) -> bool: ...
    def entries(self, path: str) -> dict[str, ObjectInfo | None]: ...  # folders: None
    def write(self, path: str, data: bytes) -> None: ...
    def upload(self, local: str, path: str) -> None: ...
    def delete(self, path: str) -> None: ...


class Storage:
    """Access to every URL of a run. Picklable; each process makes its connections on first use, also after a fork."""

    def __init__(self, config: StorageConfig = StorageConfig()):
        self.config = config
        self._backends: dict[tuple[int, str], _Backend] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    def read(self, url: str) -> bytes:
        """The whole object."""
        return self._do(url, "reading", lambda backend, path: backend.read(path))

    def read_range(self, url: str, start: int, stop: int, etag: str | None = None) -> bytes:
        """Exactly the bytes [start, stop). With `etag`, ObjectChanged when the object is no longer that one."""
        if stop <= start:
            return b""

        def call(backend: _Backend, path: str) -> bytes:
            data = backend.read_range(path, start, stop, etag)
            if len(data) != stop - start:
                size = backend.info(path).size
                if size < stop:
                    raise EOFError(f"it holds {size} bytes, and bytes {start} to {stop} were asked for")
                raise _Transient(f"{len(data)} of {stop - start} bytes came")
            return data

        return self._do(url, "reading", call)

    def open(self, url: str) -> BinaryIO:
        """The object as a stream, read forward in large pieces; it fails if the object changes meanwhile."""
        if is_local(url):
            return self._do(url, "opening", lambda _, local: open(local, "rb"))
        return io.BufferedReader(_RemoteStream(self, url, self.info(url)), PIECE)

    def info(self, url: str) -> ObjectInfo:
        """Raises NotFound when the object is absent."""
        return self._do(url, "looking at", lambda backend, path: backend.info(path))

    def exists(self, url: str) -> bool:
        """True for an object and for a folder that holds something."""
        return self._do(url, "looking for", _exists)

    def list(self, url: str) -> list[str]:
        """Names of the objects and folders directly in the folder, sorted; [] when it is absent."""
        return sorted(self._do(url, "listing", lambda backend, path: backend.entries(path)))

    def list_info(self, url: str) -> dict[str, ObjectInfo]:
        """Name and info of every object directly in the folder, by one listing."""
        entries = self._do(url, "listing", lambda backend, path: backend.entries(path))
        return {name: entries[name] for name in sorted(entries) if entries[name] is not None}  # type: ignore[misc]

    def write(self, url: str, data: bytes) -> None:
        """Readers see the old object or the whole new one."""
        self._do(url, "writing", lambda backend, path: backend.write(path, data))

    def upload(self, local_path: str | os.PathLike[str], url: str) -> None:
        """Copies a local file to `url`, whole or not at all."""
        self._do(url, "uploading to", lambda backend, path: backend.upload(os.fspath(local_path), path))

    def download(self, url: str, local_path: str | os.PathLike[str]) -> None:
        """Copies an object to a local file, whole or not at all."""
        with self.open(url) as source, _replacing(os.fspath(local_path)) as target:
            shutil.copyfileobj(source, target, PIECE)

    def delete(self, url: str) -> None:
        """Removes an object, or a folder with all it holds. Absent is fine."""
        self._do(url, "deleting", lambda backend, path: backend.delete(path))

    def _backend(self, url: str) -> tuple[_Backend, str]:
        protocol, path = _parse(url)
        key = (os.getpid(), protocol)
        with self._lock:
            if key not in self._backends:
                self._backends[key] = _make_backend(protocol, self.config)
            return self._backends[key], path

    def _do(self, url: str, action: str, call: Callable[[Any, str], T]) -> T:
        backend, path = self._backend(url)
        started = time.monotonic()
        for attempt in range(1, self.config.attempts + 1):
            try:
                return call(backend, path)
            except StorageError:
                raise
            except Exception as error:
                failure = _failure(url, action, error, self.config)
                if failure is None:
                    raise  # a programmer's error: neither the user's nor the store's
                if not _is_transient(error):
                    raise failure from error
                waited = time.monotonic() - started
                wait = _jitter.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)))
                if attempt == self.config.attempts or waited + wait > self.config.deadline_seconds:
                    raise StorageError(f"{failure} Tried {attempt} times in {waited:.0f} s.") from error
                time.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")


class _RemoteStream(io.RawIOBase):
    """An object read forward by ranges, each retried on its own, all of one version."""

    def __init__(self, storage: Storage, url: str, info: ObjectInfo):
        self._storage, self._url, self._info = storage, url, info
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._info.size)
        data = self._storage.read_range(self._url, self._at, stop, self._info.etag)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)


class _Local:
    """Files of this machine."""

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if etag is not None and _local_info(os.fstat(descriptor)).etag != etag:
                raise _Changed()
            pieces = []
            while start < stop and (piece := os.pread(descriptor, stop - start, start)):
                pieces.append(piece)
                start += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            os.close(descriptor)

    def info(self, path: str) -> ObjectInfo:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
        return _local_info(os.stat(path))

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        try:
            with os.scandir(path) as found:
                entries = [entry for entry in found if not _is_temporary(entry.name)]
                return {e.name: None if e.is_dir() else _local_info(e.stat()) for e in entries}
        except FileNotFoundError:
            return {}

    def write(self, path: str, data: bytes) -> None:
        with _replacing(path) as file:
            file.write(data)

    def upload(self, local: str, path: str) -> None:
        with open(local, "rb") as source, _replacing(path) as target:
            shutil.copyfileobj(source, target, PIECE)

    def delete(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


class _S3:
    """An S3-compatible store through s3fs's client."""

    def __init__(self, config: StorageConfig):
        import s3fs

        options: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 1}}
        # Stores other than AWS reject the newer checksum trailers, and most want the bucket in the path.
        options |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        if config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
            options["s3"] = {"addressing_style": "path"}
        self._fs = s3fs.S3FileSystem(
            key=resolve_secret(config.key),
            secret=resolve_secret(config.secret),
            endpoint_url=config.endpoint_url,
            config_kwargs=options,
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        self._fs.retries = 1  # `Storage` retries

    def read(self, path: str) -> bytes:
        return self._get(path)

    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes:
        condition = {"IfMatch": f'"{etag}"'} if etag else {}
        return self._get(path, Range=f"bytes={start}-{stop - 1}", **condition)

    def info(self, path: str) -> ObjectInfo:
        head = self._fs.call_s3("head_object", **_bucket_key(path))
        return ObjectInfo(head["ContentLength"], head["ETag"].strip('"'))

    def is_folder(self, path: str) -> bool:
        bucket, _, key = path.partition("/")
        prefix = key.rstrip("/") + "/" if key else ""
        return bool(self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"))

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        bucket, _, key = path.partition("/")
        prefix = key.rstrip("/") + "/" if key else ""
        found: dict[str, ObjectInfo | None] = {}
        for page in self._pages(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            for folder in page.get("CommonPrefixes", []):
                found[folder["Prefix"][len(prefix) :].rstrip("/")] = None
            for item in page.get("Contents", []):
                found[item["Key"][len(prefix) :]] = ObjectInfo(item["Size"], item["ETag"].strip('"'))
        found.pop("", None)  # the folder's own marker object
        return found

    def write(self, path: str, data: bytes) -> None:
        self._fs.call_s3("put_object", Body=data, **_bucket_key(path))

    def upload(self, local: str, path: str) -> None:
        self._fs.put_file(local, path)  # multipart when large; completed last, so never seen half

    def delete(self, path: str) -> None:
        bucket, _, key = path.partition("/")
        keys = [key] if key else []
        prefix = key.rstrip("/") + "/" if key else ""
        for page in self._pages(Bucket=bucket, Prefix=prefix):
            keys += [item["Key"] for item in page.get("Contents", [])]
        for first in range(0, len(keys), 1000):
            chosen = [{"Key": key} for key in keys[first : first + 1000]]
            answer = self._fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": chosen, "Quiet": True})
            if errors := answer.get("Errors"):
                raise _Transient(f"{len(errors)} objects stayed, the first: {errors[0]}")

    def _pages(self, **query: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = self._fs.call_s3("list_objects_v2", **query)
            yield page
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    def _get(self, path: str, **query: Any) -> bytes:
        from fsspec.asyn import sync

        async def fetch() -> bytes:
            answer = await self._fs._call_s3("get_object", **_bucket_key(path), **query)
            async with answer["Body"] as body:
                return await body.read()

        return sync(self._fs.loop, fetch)


class _Other:
    """Any other fsspec file system, by its plain calls."""

    def __init__(self, protocol: str):
        import fsspec

        try:
            self._fs = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"{protocol}:// cannot be reached from here: {error}. Install the fsspec package for '{protocol}', "
                "or use a local path or s3://."
            ) from error

    def read(self, path: str) -> bytes:
        return self._fs.cat_file(path)

    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes:
        return self._fs.cat_file(path, start=start, end=stop)

    def info(self, path: str) -> ObjectInfo:
        found = self._fs.info(path)
        if found["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, "is a folder, not a file")
        tag = found.get("etag") or found.get("ETag")
        return ObjectInfo(found["size"], tag)

    def is_folder(self, path: str) -> bool:
        return self._fs.isdir(path)

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        try:
            found = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        named = {item["name"].rstrip("/").rpartition("/")[2]: item for item in found}
        return {n: None if i["type"] == "directory" else ObjectInfo(i["size"], i.get("etag")) for n, i in named.items()}

    def write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(path, data)

    def upload(self, local: str, path: str) -> None:
        self._fs.put_file(local, path)

    def delete(self, path: str) -> None:
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)


class _Changed(Exception):
    """A local file is not the one whose tag was known."""


def _parse(url: str) -> tuple[str, str]:
    protocol, separator, rest = url.partition("://")
    if not separator or protocol == "file":
        return "file", os.path.expanduser(rest if separator else url)
    if protocol in ("s3", "s3a"):
        return "s3", rest.strip("/")
    return protocol, url


def _make_backend(protocol: str, config: StorageConfig) -> _Backend:
    if protocol == "file":
        return _Local()
    return _S3(config) if protocol == "s3" else _Other(protocol)


def _bucket_key(path: str) -> dict[str, str]:
    bucket, _, key = path.partition("/")
    if not key:
        raise FileNotFoundError(errno.ENOENT, "a bucket holds no bytes itself; name an object in it")
    return {"Bucket": bucket, "Key": key}


def _exists(backend: _Backend, path: str) -> bool:
    try:
        backend.info(path)
        return True
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return backend.is_folder(path)


def _local_info(stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


class _replacing:
    """A file that takes `path`'s place when the block ends well, and leaves no trace when it does not."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> BinaryIO:
        folder, name = os.path.split(os.path.abspath(self._path))
        os.makedirs(folder, exist_ok=True)
        self._temporary = os.path.join(folder, f".{name[:100]}.{_jitter.getrandbits(64):016x}.partial")
        descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._file = os.fdopen(descriptor, "wb")
        return self._file

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.replace(self._temporary, self._path)
        finally:
            if os.path.exists(self._temporary):
                os.unlink(self._temporary)


def _code(error: BaseException) -> str:
    """The S3 error code or HTTP status behind an exception, or ''."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "urllib3"}
_LASTING_OS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_LASTING_ERRNO = {errno.EINVAL, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS, errno.EDQUOT}


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, (_Changed, EOFError, *_LASTING_OS)) or "Credentials" in type(error).__name__:
        return False
    if type(error).__name__ in ("ParamValidationError", "NoRegionError"):  # botocore's
        return False
    return not (isinstance(error, OSError) and error.errno in _LASTING_ERRNO)


def _failure(url: str, action: str, error: Exception, config: StorageConfig) -> StorageError | None:
    """The exception to tell the user, or None when it is neither the user's fault nor the store's."""
    origin = type(error).__module__.split(".")[0]
    known = (OSError, EOFError, _Transient, _Changed, TimeoutError)
    if not isinstance(error, known) and origin not in _LIBRARIES:
        return None
    where = f" at {config.endpoint_url}" if config.endpoint_url and url.startswith("s3") else ""
    told = partial("{url}: {action} failed: {why}".format, url=url, action=action)
    code = _code(error)
    if isinstance(error, _Changed) or code in ("PreconditionFailed", "412"):
        return ObjectChanged(told(why="the object was replaced while it was in use. Do not change what a run reads."))
    if isinstance(error, EOFError):
        return StorageError(told(why=f"the object is too short: {error}. It was cut or replaced; write it again."))
    if code == "NoSuchBucket":
        bucket = _parse(url)[1].partition("/")[0]
        return NotFound(told(why=f"bucket '{bucket}' does not exist{where}. Create it, or correct the URL."))
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return NotFound(told(why=f"it does not exist{where}. Check the URL."))
    if isinstance(error, PermissionError):
        return StorageError(told(why=f"access was denied{where} ({error}). Check the credentials and permissions."))
    if "Credentials" in type(error).__name__:
        return StorageError(
            told(
                why=f"no credentials{where} ({error}). Set storage.key and storage.secret, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY."
            )
        )
    if "EndpointConnection" in type(error).__name__ or "ConnectTimeout" in type(error).__name__:
        return StorageError(
            told(why=f"the store did not answer{where} ({error}). Check storage.endpoint_url and that it is running.")
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(told(why=f"no space left ({error.strerror}). Free some, or choose another output."))
    return StorageError(told(why=f"{type(error).__name__}: {error}. Check the URL, and that it can be reached."))
