"""What `Storage` asks of a store, and what it is told about an object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, and a tag that changes with the content (ETag; for local files time and size)."""

    size: int
    etag: str | None


Part = Callable[[int, int], bytes]  # the bytes [start, stop) of what is written; may be asked twice, and by any thread


class Backend(Protocol):
    """Operations on one kind of store; paths are its own. Failures are raised as `faults` names them."""

    def read(self, path: str) -> bytes: ...
    def read_range(self, path: str, start: int, stop: int, etag: str | None) -> bytes: ...  # all of it, or an error
    def info(self, path: str) -> ObjectInfo: ...
    def is_folder(self, path: str) -> bool: ...
    def entries(self, path: str) -> dict[str, ObjectInfo | None]: ...  # folders: None
    def write(self, path: str, data: bytes) -> None: ...
    def write_parts(self, path: str, size: int, part: Part) -> None: ...  # never held as a whole, where that can be
    def create_parts(self, path: str, size: int, part: Part) -> None: ...  # or FileExistsError
    def abandon_uploads(self, path: str, chosen: Callable[[str], bool]) -> int: ...  # of names relative to the folder
    def upload(self, local: str, path: str) -> None: ...
    def delete(self, path: str) -> None: ...
