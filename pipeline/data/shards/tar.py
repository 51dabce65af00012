"""Walk through a tar: every regular file with the offset of its data, and proof that the tar is complete.

ustar, GNU and PAX formats are read, with long names and large files. A tar is complete if every member is and both zero
blocks end it; a truncated, compressed or damaged tar is an error that names it.

Samples follow webdataset's rule: consecutive files whose paths agree up to the first dot of the file name. A hard link
counts as a file, because its data is in the same tar. Entries without data (symbolic links, devices, …) and files that
belong to no sample are skipped and counted.
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
_METADATA = re.compile(r"__[^/]*__(/|$)")  # paths that webdataset reserves


@dataclass
class TarSample:
    """Sample of a tar; members are (extension, offset of the data, data) in the tar's order."""

    key: str
    is_duplicate: bool  # an earlier sample of the tar has the same key
    members: list[tuple[str, int, bytes]] = field(default_factory=list)

    @property
    def contents(self) -> dict[str, bytes]:
        return {extension: data for extension, _, data in self.members}


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
        """Yield every sample in order. A repeated extension begins another sample with the same key.

        Raises DataError, naming the tar, unless it is a complete, uncompressed tar with more than links.
        """
        keys: set[str] = set()
        sample: TarSample | None = None
        for path, offset, data in self.files():
            key, extension = split_key(path)
            if not extension:
                if _METADATA.match(path.removeprefix("./")):
                    kind = "file of webdataset's metadata"
                else:
                    is_hidden = path.rpartition("/")[2].startswith(".")
                    kind = "hidden file" if is_hidden else "file without an extension"
                self._skip(kind, path)
                continue
            if sample is None or sample.key != key or any(extension == other for other, _, _ in sample.members):
                if sample is not None:
                    yield sample
                sample = TarSample(key, is_duplicate=key in keys)
                keys.add(key)
            sample.members.append((extension, offset, data))
        if sample is not None:
            yield sample
        elif any(kind in self.skipped for kind in (*_EMPTY_KINDS.values(), _BROKEN_LINK)):
            raise self._error(f"no sample, only {self.skipped_summary()}. Pack the files themselves: tar --dereference")

    def files(self) -> Iterator[tuple[str, int, bytes]]:
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
            data = b""
            if kind not in b"123456":
                data = self._read(-(-size // BLOCK) * BLOCK, "inside a member's data")[:size]
            if kind == b"L":
                long_name = _until_zero(data)
            elif kind == b"K":
                long_link = _until_zero(data)
            elif kind == b"x":
                attributes = self._pax_records(data, offset)
            if kind in b"LKxg":
                continue
            path = _until_zero(attributes.get(b"path", b"")) or long_name
            if not path:
                path, prefix = _until_zero(header[:100]), _until_zero(header[345:500])
                if prefix and header[257:263] == b"ustar\0":  # GNU's older format has other fields there
                    path = prefix + b"/" + path
            if kind in b"\x000" and path.endswith(b"/") and not size:
                kind = b"5"  # a folder in tars from before folders had a type
            name, link_key = clean_name(path), path.removeprefix(b"./")
            if kind in b"\x0007":
                places[link_key] = offset, size
                yield name, offset, data
            elif kind == b"1":
                target = attributes.get(b"linkpath") or long_link or _until_zero(header[157:257])
                if (place := places.get(target.removeprefix(b"./"))) is None:
                    self._skip(_BROKEN_LINK, name)
                else:
                    places[link_key] = place
                    yield name, place[0], self.fetch(place[0], sum(place))
            elif kind != b"5":
                self._skip(_EMPTY_KINDS.get(kind, f"entry of type {clean_name(kind)!r}"), name)
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

    def _skip(self, kind: str, path: str) -> None:
        self.skipped[kind] += 1
        self.first_skipped = self.first_skipped or path

    def _data_size(self, header: bytes, attributes: dict[bytes, bytes]) -> int:
        """Return the size of the data after a header. Raise DataError if that or the header is invalid."""
        place = self.position - len(header)
        if place == 0 and header.startswith(_COMPRESSED):
            raise self._error(f"it is compressed and cannot be read by range. {unpack_remedy(self.name)}")
        if len(header) < BLOCK:
            raise self._error(ends="inside a header" if header else "before the two zero blocks that end a tar")
        others = header[:148] + header[156:]
        unsigned = sum(others) + 8 * ord(" ")  # the checksum's own bytes count as spaces
        signed = unsigned - 256 * sum(byte > 127 for byte in others)  # as old tars sum them
        try:
            is_header = _parse_number(header[148:156]) in (unsigned, signed)
        except ValueError:
            is_header = False
        if not is_header:
            raise self._error(f"no tar header at byte {place}: not a tar, or damaged. Rebuild or restore it")
        try:
            text = attributes.get(b"size")
            if text is not None and not re.fullmatch(rb"[0-9]{1,19}", text):
                raise ValueError(f"{text[:40]!r} is not a size")
            size = _parse_number(header[124:136]) if text is None else int(text)
        except ValueError as error:
            raise self._error(f"the header at byte {place} states no valid size ({error}). Restore it") from None
        if header[156:157] not in b"123456" and size > self.size - self.position:
            raise self._error(
                f"the shard is truncated or damaged: the header at byte {place} states {size} bytes of data, and "
                f"{max(0, self.size - self.position)} follow it. Copy or build it again"
            )
        return size

    def _pax_records(self, data: bytes, place: int) -> dict[bytes, bytes]:
        """Return the records 'length key=value\\n' of the extended header at `place`; zeros may follow them."""
        records, position = {}, 0
        while position < len(data) and data[position]:
            match = _PAX_RECORD.match(data, position)
            stop = position + int(match[1]) if match else 0
            key, equals, value = data[match.end() : stop - 1].partition(b"=") if match else (b"", b"", b"")
            if not equals or not key or data[stop - 1 : stop] != b"\n":
                raise self._error(f"the extended header at byte {place} is damaged. Restore or rebuild it")
            records[key] = value
            position = stop
        return records

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
        yield Tar(stream, location, info.size, lambda start, stop: storage.read_range(location, start, stop, info.etag))


def split_key(path: str) -> tuple[str, str]:
    """Return ('folder/0001', 'seg.png') for 'folder/0001.seg.png'; the extension is '' if the file is in no sample."""
    path = path.removeprefix("./")
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem or _METADATA.match(path):
        return path, ""
    return folder + slash + stem, extension.lower()


def clean_name(name: bytes) -> str:
    """Return a member's name as text. Bytes that are not UTF-8 are escaped: b'caf\\xe9' becomes 'caf\\\\xe9'.

    Different names stay different: a backslash next to such bytes is doubled.
    """
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def unpack_remedy(name: str) -> str:
    return f"Unpack {name.rpartition('/')[2]} to a plain .tar (gunzip, or zstd -d): images gain nothing by it"


def _parse_number(field: bytes) -> int:
    """Return a header's number: octal text, or base 256 if the first bit is set (GNU, from 8 GiB).

    Raises ValueError for any other text and a negative number.
    """
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ValueError(f"{field.hex()} is negative")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    text = _until_zero(field).strip(b" ")
    if text.strip(b"01234567"):
        raise ValueError(f"{text!r} is not octal")
    return int(text or b"0", 8)


def _until_zero(data: bytes) -> bytes:
    return data.partition(b"\0")[0]
