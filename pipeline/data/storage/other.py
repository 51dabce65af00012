"""Any store that fsspec reaches, by its plain calls: gs://, az://, hf://, memory:// and so on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import fsspec

from pipeline.config.errors import StorageError
from pipeline.data.storage.backend import ObjectInfo, Part
from pipeline.data.storage.faults import Changed, Fault, Refused, TooShort
from pipeline.data.storage.receive import Answer, receive
from pipeline.data.storage.retry import Retry

T = TypeVar("T")


class Other:
    """Paths are whole URLs. Raises StorageError when no file system of that protocol is installed."""

    def __init__(self, protocol: str, retry: Retry):
        try:
            self._fs = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
        except Exception as error:  # whatever a package says whose settings or libraries are not there
            raise StorageError(
                f"{protocol}:// cannot be reached from here: {' '.join(str(error).split())}. "
                f"Install the fsspec package for '{protocol}' and what it needs, or use a local path or s3://."
            ) from error
        self._retry = retry

    def read(self, path: str) -> bytes:
        return self._call(lambda: self._fs.cat_file(path))

    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes:
        def ask(at: int, stop: int | None, tag: str | None) -> Answer:
            assert stop is not None
            data = self._call(lambda: self._fs.cat_file(path, start=at, end=stop))
            if len(data) < stop - at and (size := self.info(path).size) < stop:
                raise TooShort(size, start, stop)
            return Answer(stop, tag, _once(data))

        data = receive(ask, path, start, stop, etag, self._retry)
        if etag is not None and self.info(path).etag != etag:  # fsspec knows no If-Match
            raise Changed()
        return data

    def info(self, path: str) -> ObjectInfo:
        found = self._call(lambda: self._fs.info(path))
        if found["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, "is a folder, not a file")
        if not isinstance(found.get("size"), int):
            raise Refused("the store does not tell the object's size", "Copy it to a local folder or s3://.")
        return self._info(found)

    def is_folder(self, path: str) -> bool:
        return self._call(lambda: self._fs.isdir(path))

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        try:
            found = self._call(lambda: self._fs.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        named = {item["name"].rstrip("/").rpartition("/")[2]: item for item in found}
        return {name: None if item["type"] == "directory" else self._info(item) for name, item in named.items()}

    def write(self, path: str, data: bytes) -> None:
        self._call(lambda: self._fs.pipe_file(path, data))

    def write_parts(self, path: str, size: int, part: Part) -> None:
        self.write(path, part(0, size))  # whole: fsspec knows no upload in parts that is given up when one fails

    def create_parts(self, path: str, size: int, part: Part) -> None:
        if self._call(lambda: self._fs.exists(path)):  # two steps: fsspec knows no condition
            raise FileExistsError(errno.EEXIST, "exists already", path)
        self.write_parts(path, size, part)

    def abandon_uploads(self, path: str, chosen: Callable[[str], bool]) -> int:
        return 0  # fsspec lists none

    def upload(self, local: str, path: str) -> None:
        self._call(lambda: self._fs.put_file(local, path))

    def delete(self, path: str) -> None:
        if self._call(lambda: self._fs.exists(path)):
            self._call(lambda: self._fs.rm(path, recursive=True))

    def _info(self, found: dict[str, Any]) -> ObjectInfo:
        if not isinstance(found.get("size"), int):  # web servers' listings have none
            return self.info(found["name"])
        return ObjectInfo(found["size"], found.get("etag") or found.get("ETag"))

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (OSError, TypeError, AssertionError):
            raise  # said plainly already, or a programmer's error
        except NotImplementedError as error:
            raise Refused("stores of this kind do not offer that", "Use a local path or s3://.") from error
        except Exception as error:
            named = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, (ValueError, LookupError, AttributeError)):
                raise Refused(named) from error
            status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(error, "code", 0)
            lasts = isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)
            raise (Refused if lasts else Fault)(named) from error


def _once(data: bytes) -> Generator[bytes, None, None]:
    yield data
