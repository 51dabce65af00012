"""Walk through a tar (ustar, GNU, PAX): every regular file with the offset of its data, and proof that the tar is
complete. Samples follow webdataset's rule: consecutive files whose paths agree up to the first dot of the file name. A
hard link counts as a file, because its data is in the same tar; entries without data (symbolic links, devices, …) and
files that belong to no sample are skipped and counted.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.config.errors import DataError
from pipeline.data.storage import ObjectInfo, Storage

BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstd
_TAIL_BYTES = 1 << 20  # read at once after the zero blocks
_EMPTY_KINDS = {b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "pipe"}
_PAX_RECORD = re.compile(rb"([0-9]{1,19}) ")  # the length at the beginning of an extended header's record
_BROKEN_LINK = "hard link to a file that does not precede it in the tar"
UNPACK = "Unpack {} to a plain .tar (gunzip, or zstd -d): images gain nothing by it"
_METADATA = re.compile(r"__[^/]*__(/|$)")  # paths that webdataset reserves


@dataclass
class TarSample:
    """Sample of a tar, with its members in the tar's order."""

    key: str
    is_duplicate: bool  # an earlier sample of the tar has the same key
    contents: dict[str, bytes] = field(default_factory=dict)  # by extension
    offsets: list[int] = field(default_factory=list)  # of each member's data


@dataclass
class Tar:
    """Tar read once from front to back. After the walk, `position` and `digest` are those of the whole file."""

    stream: BinaryIO
    name: str  # for messages
    size: int  # bytes
    fetch: Callable[[int, int], bytes]  # read [start, stop) again, for the target of a hard link
    skipped: Counter[str] = field(default_factory=Counter)  # entries that belong to no sample, by kind
    first_skipped: str = ""
    position: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def samples(self) -> Iterator[TarSample]:
        """Yield all samples; a repeated extension begins another. Raises DataError unless it is complete and plain."""
        keys: set[str] = set()
        sample: TarSample | None = None
        for path, offset, data in self._files():
            path = path.removeprefix("./")
            folder, slash, name = path.rpartition("/")
            stem, _, extension = name.partition(".")
            key, extension = folder + slash + stem, extension.lower()
            is_metadata = bool(_METADATA.match(path))
            if is_metadata or not stem or not extension:
                other = "hidden file" if name.startswith(".") else "file without an extension"
                self.skipped["file of webdataset's metadata" if is_metadata else other] += 1
                self.first_skipped = self.first_skipped or path
                continue
            if sample is None or sample.key != key or extension in sample.contents:
                if sample is not None:
                    yield sample
                sample = TarSample(key, is_duplicate=key in keys)
                keys.add(key)
            sample.contents[extension] = data
            sample.offsets.append(offset)
        if sample is not None:
            yield sample
        elif any(kind in self.skipped for kind in (*_EMPTY_KINDS.values(), _BROKEN_LINK)):
            raise self._error(f"no sample, only {self.skipped_summary()}. Pack the files themselves: tar --dereference")

    def _files(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield (path, offset of the data, data) of every regular file, then check the end of the tar."""
        places: dict[bytes, tuple[int, int]] = {}  # path of each regular file -> (offset, size) of its data
        long_name, long_link = b"", b""
        attributes: dict[bytes, bytes] = {}
        while (header := self._read(BLOCK)) != bytes(BLOCK):
            offset = self.position
            size = self._data_size(header, attributes)
            kind = header[156:157]
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in attributes):
                raise self._error("it has a sparse file, which cannot be read by range. Pack it without --sparse")
            data = b"" if kind in b"123456" else self._read(-(-size // BLOCK) * BLOCK, "inside a member's data")[:size]
            if kind == b"L":
                long_name = _until_zero(data)
            elif kind == b"K":
                long_link = _until_zero(data)
            elif kind == b"x":  # records 'length key=value\n', which zeros may follow
                attributes, at = {}, 0
                while at < len(data) and data[at]:
                    match = _PAX_RECORD.match(data, at)
                    stop = at + int(match[1]) if match else 0
                    key, equals, value = data[match.end() : stop - 1].partition(b"=") if match else (b"", b"", b"")
                    if not equals or not key or data[stop - 1 : stop] != b"\n":
                        raise self._error(f"the extended header at byte {offset} is damaged. Restore or rebuild it")
                    attributes[key], at = value, stop
            if kind in b"LKxg":
                continue
            path = _until_zero(attributes.get(b"path", b"")) or long_name
            if not path:
                path, prefix = _until_zero(header[:100]), _until_zero(header[345:500])
                if prefix and header[257:263] == b"ustar\0":  # GNU's older format has other fields there
                    path = prefix + b"/" + path
            if kind in b"\x000" and path.endswith(b"/") and not size:
                kind = b"5"  # a folder in tars from before folders had a type
            name, link_key, skipped = clean_name(path), path.removeprefix(b"./"), ""
            if kind in b"\x0007":
                places[link_key] = offset, size
                yield name, offset, data
            elif kind == b"1":
                target = attributes.get(b"linkpath") or long_link or _until_zero(header[157:257])
                if place := places.get(target.removeprefix(b"./")):
                    places[link_key] = place
                    yield name, place[0], self.fetch(place[0], sum(place))
                else:
                    skipped = _BROKEN_LINK
            elif kind != b"5":
                skipped = _EMPTY_KINDS.get(kind, f"entry of type {clean_name(kind)!r}")
            if skipped:
                self.skipped[skipped] += 1
                self.first_skipped = self.first_skipped or name
            long_name, long_link, attributes = b"", b"", {}
        if self._read(BLOCK) != bytes(BLOCK):
            raise self._error(ends="between the two zero blocks that end a tar")
        while rest := self._read(_TAIL_BYTES):
            if rest.count(0) != len(rest):
                raise self._error("data follows its end (concatenated tars?). Pack it again as one tar")

    def skipped_summary(self) -> str:
        """Return the skipped entries for a message; '' for none."""
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.skipped.most_common())
        return f"{kinds} (the first: {self.first_skipped})" if kinds else ""

    def _data_size(self, header: bytes, attributes: dict[bytes, bytes]) -> int:
        """Return the size of the data after a header. Raise DataError if that or the header is invalid."""
        place = self.position - len(header)
        if place == 0 and header.startswith(_COMPRESSED):
            remedy = UNPACK.format(self.name.rpartition("/")[2])
            raise self._error(f"it is compressed and cannot be read by range. {remedy}")
        if len(header) < BLOCK:
            raise self._error(ends="inside a header" if header else "before the two zero blocks that end a tar")
        others = header[:148] + header[156:]
        unsigned = sum(others) + 8 * ord(" ")  # the checksum's own bytes count as spaces
        signed = unsigned - 256 * sum(byte > 127 for byte in others)  # as old tars sum them
        if _parse_number(header[148:156]) not in (unsigned, signed):
            raise self._error(f"no tar header at byte {place}: not a tar, or damaged. Rebuild or restore it")
        size = _parse_number(stated := header[124:136])
        if b"size" in attributes:
            size = int(stated) if re.fullmatch(rb"[0-9]{1,19}", stated := attributes[b"size"]) else -1
        if size < 0:
            raise self._error(f"the header at byte {place} states no valid size ({stated[:40]!r}). Restore it")
        rest = max(0, self.size - self.position)
        if header[156:157] not in b"123456" and size > rest:
            fault = f"the header at byte {place} states {size} bytes of data, and {rest} follow it"
            raise self._error(f"the shard is truncated or damaged: {fault}. Copy or build it again")
        return size

    def _read(self, size: int, where: str = "") -> bytes:
        """Return the next `size` bytes, or fewer at the end of the tar; raise DataError for fewer if `where` is set."""
        data = self.stream.read(size)
        while len(data) < size and (more := self.stream.read(size - len(data))):
            data += more
        self.position += len(data)
        self.digest.update(data)
        if where and len(data) < size:
            raise self._error(ends=where)
        return data

    def _error(self, message: str = "", ends: str = "") -> DataError:
        """Return the error of a tar that ends too early, at `ends`, or of another fault."""
        truncated = f"the shard is truncated: it ends at byte {self.position}, {ends}. Copy or build it again"
        return DataError(f"{self.name}: {message or truncated}")


@contextmanager
def open_tar(storage: Storage, location: str, info: ObjectInfo) -> Iterator[Tar]:
    """Open a tar of a store for one walk; `info` is the store's info about it."""
    with storage.open(location) as stream:
        yield Tar(stream, location, info.size, lambda start, stop: storage.read(location, start, stop, info.etag))


def clean_name(name: bytes) -> str:
    """Return a name as text; names stay distinct. Bytes that are not UTF-8 are escaped: b'\\xe9' becomes '\\\\xe9'."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def _parse_number(field: bytes) -> int:
    """Return a header's number: octal text, or base 256 if the first bit is set (GNU, from 8 GiB); -1 if invalid."""
    if field[0] & 0x80:
        return -1 if field[0] & 0x40 else int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    text = _until_zero(field).strip(b" ")
    return -1 if text.strip(b"01234567") else int(text or b"0", 8)


def _until_zero(data: bytes) -> bytes:
    return data.partition(b"\0")[0]
