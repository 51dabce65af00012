"""Walking a tar: every regular file with the place of its data, and proof that the tar is whole.

ustar, GNU and PAX, long names and large files included. A tar is whole only when every member is complete and both
zero blocks end it: one that was cut anywhere is refused by name, and so is one that is compressed or damaged.

Samples are as webdataset reads them: consecutive files whose paths agree up to the first dot of the file's name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.config.errors import DataError

BLOCK = 512
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstd
_END = 1 << 20  # bytes read at once of what follows the zero blocks


@dataclass
class TarSample:
    """One sample as it lies in its tar: members are (extension, offset of the data, data) in the tar's order."""

    key: str
    is_duplicate: bool  # the key was seen before in this tar
    members: list[tuple[str, int, bytes]] = field(default_factory=list)

    @property
    def contents(self) -> dict[str, bytes]:
        return {extension: data for extension, _, data in self.members}

    @property
    def offset(self) -> int:
        """Of the sample's first byte of data in the tar."""
        return self.members[0][1]


class Tar:
    """A tar read once from front to back. After the walk, `position` and `digest` are those of the whole file."""

    def __init__(self, stream: BinaryIO, name: str):
        self._stream, self._name = stream, name
        self.position = 0
        self.digest = hashlib.sha256()

    def samples(self) -> Iterator[TarSample]:
        """Every sample in its order. A member that a sample already has begins another one of the same key.

        Raises DataError, with the tar's name, for anything but a whole, plain tar.
        """
        seen: set[str] = set()
        sample: TarSample | None = None
        for path, offset, data in self.files():
            key, extension = split_key(path)
            if not extension:
                continue
            if sample is None or sample.key != key or any(extension == other for other, _, _ in sample.members):
                if sample is not None:
                    yield sample
                sample = TarSample(key, is_duplicate=key in seen)
                seen.add(key)
            sample.members.append((extension, offset, data))
        if sample is not None:
            yield sample

    def files(self) -> Iterator[tuple[str, int, bytes]]:
        """(path, offset of the data, data) of every regular file, then checks that the tar ends as it must."""
        long_name: str | None = None
        attributes: dict[str, str] = {}
        while header := self._header():
            size = int(attributes.get("size", _number(header[124:136])))
            kind = header[156:157]
            offset = self.position
            if kind in b"LKxg":
                data = self._data(size)
                if kind == b"L":
                    long_name = _text(data)
                elif kind == b"x":
                    attributes = _pax(data)
                continue
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in attributes):
                raise self._fault("it holds a sparse file, which cannot be read by range. Pack it without --sparse")
            if kind in b"\x0007":
                yield attributes.get("path") or long_name or _path(header), offset, self._data(size)
            elif kind not in b"123456":  # links, devices, folders and pipes have no data
                self._data(size)
            long_name, attributes = None, {}
        self._end()

    def _header(self) -> bytes | None:
        block = self._read(BLOCK)
        if self.position == len(block) and block.startswith(_PACKED):
            raise self._fault(f"it is compressed and cannot be read by range. {unpack_remedy(self._name)}")
        if len(block) < BLOCK:
            raise self._cut("inside a header" if block else "before the two zero blocks that end a tar")
        if block == bytes(BLOCK):
            return None
        unsigned = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
        try:
            stated = _number(block[148:156])
        except ValueError:
            stated = -1
        if stated != unsigned:
            place = self.position - BLOCK
            raise self._fault(f"no tar header at byte {place}: it is no tar, or was damaged. Rebuild or restore it")
        return block

    def _data(self, size: int) -> bytes:
        padded = -(-size // BLOCK) * BLOCK
        data = self._read(padded)
        if len(data) < padded:
            raise self._cut("inside a member's data")
        return data[:size]

    def _end(self) -> None:
        if self._read(BLOCK) != bytes(BLOCK):
            raise self._cut("between the two zero blocks that end a tar")
        while rest := self._read(_END):
            if rest.count(0) != len(rest):
                raise self._fault("data follows its end (tars put end to end?). Pack it again as one tar")

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        self.position += len(data)
        self.digest.update(data)
        return data

    def _cut(self, where: str) -> DataError:
        return self._fault(f"the shard is truncated: it ends at byte {self.position}, {where}. Copy or build it again")

    def _fault(self, what: str) -> DataError:
        return DataError(f"{self._name}: {what}")


def split_key(path: str) -> tuple[str, str]:
    """('folder/0001', 'seg.png') of 'folder/0001.seg.png'; the extension is '' for what is no sample's member."""
    path = path.removeprefix("./")
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem or stem.startswith("__"):  # hidden files; webdataset's own metadata
        return path, ""
    return folder + slash + stem, extension.lower()


def unpack_remedy(name: str) -> str:
    return f"Unpack {name.rpartition('/')[2]} to a plain .tar (gunzip, or zstd -d): images gain nothing by it"


def _number(field: bytes) -> int:
    """A header's number: octal text, or base 256 when the first bit is set (GNU, for 8 GiB and more)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _path(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    is_posix = header[257:263] == b"ustar\0"  # GNU's older layout keeps other things in the prefix's place
    return f"{prefix}/{name}" if prefix and is_posix else name


def _pax(data: bytes) -> dict[str, str]:
    """The records 'length key=value\\n' of an extended header."""
    found, at = {}, 0
    while at < len(data) and (match := re.compile(rb"(\d+) ").match(data, at)):
        stop = at + int(match[1])
        key, _, value = data[match.end() : stop - 1].partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = max(stop, match.end())
    return found
