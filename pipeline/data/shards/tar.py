"""Walking a tar: every regular file with the place of its data, and proof that the tar is whole.

ustar, GNU and PAX, long names and large files included. A tar is whole only when every member is complete and both
zero blocks end it: one that was cut anywhere is refused by name, and so is one that is compressed or damaged.

Samples are as webdataset reads them: consecutive files whose paths agree up to the first dot of the file's name. A hard
link is a file like any other, for its data lies in the same tar. What holds no data (symbolic links, devices, …) or is
no sample's member is passed over and counted.
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
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstd
_END = 1 << 20  # bytes read at once of what follows the zero blocks
_EMPTY_KINDS = {b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "pipe"}  # have no data
_RECORD = re.compile(rb"([0-9]{1,19}) ")  # begins a record of an extended header: its length
_LOST_LINK = "hard link to a file that is not before it in the tar"


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
    """A tar read once from front to back. After the walk, `position` and `digest` are those of the whole file.

    `size` is the number of its bytes, and `fetch(start, stop)` reads some of them again: what a hard link names.
    `skipped` counts the entries that are no sample's, by what they are.
    """

    def __init__(self, stream: BinaryIO, name: str, size: int, fetch: Callable[[int, int], bytes]):
        self._stream, self._name, self._size, self._fetch = stream, name, size, fetch
        self._places: dict[bytes, tuple[int, int]] = {}  # path of each regular file -> (offset, size) of its data
        self._first_passed = ""
        self.skipped: Counter[str] = Counter()
        self.position = 0
        self.digest = hashlib.sha256()

    def samples(self) -> Iterator[TarSample]:
        """Every sample in its order. A member that a sample already has begins another one of the same key.

        Raises DataError, with the tar's name, for anything but a whole, plain tar, and for one that holds links alone.
        """
        seen: set[str] = set()
        sample: TarSample | None = None
        for path, offset, data in self.files():
            key, extension = split_key(path)
            if not extension:
                self._pass_over(_nameless(path), path)
                continue
            if sample is None or sample.key != key or any(extension == other for other, _, _ in sample.members):
                if sample is not None:
                    yield sample
                sample = TarSample(key, is_duplicate=key in seen)
                seen.add(key)
            sample.members.append((extension, offset, data))
        if sample is not None:
            yield sample
        elif any(kind in self.skipped for kind in (*_EMPTY_KINDS.values(), _LOST_LINK)):
            told = self.skipped_summary()
            raise self._fault(f"it holds no sample, only {told}. Pack the files themselves: tar --dereference")

    def files(self) -> Iterator[tuple[str, int, bytes]]:
        """(path, offset of the data, data) of every regular file, then checks that the tar ends as it must."""
        long_name: bytes | None = None
        long_link: bytes | None = None
        attributes: dict[bytes, bytes] = {}
        while header := self._header():
            size = self._stated_size(header, attributes)
            kind = header[156:157]
            offset = self.position
            if kind in b"LKxg":
                data = self._data(size)
                if kind == b"L":
                    long_name = _until_zero(data)
                elif kind == b"K":
                    long_link = _until_zero(data)
                elif kind == b"x":
                    attributes = self._pax(data, offset)
                continue
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in attributes):
                raise self._fault("it holds a sparse file, which cannot be read by range. Pack it without --sparse")
            path = _until_zero(attributes.get(b"path", b"")) or long_name or _path(header)
            if kind in b"\x000" and path.endswith(b"/") and not size:
                kind = b"5"  # a folder, as tars had them before there was a type for it
            if kind in b"\x0007":
                self._places[_plain(path)] = offset, size
                yield clean_name(path), offset, self._data(size)
            elif kind == b"1":
                target = attributes.get(b"linkpath") or long_link or _until_zero(header[157:257])
                if (place := self._places.get(_plain(target))) is None:
                    self._pass_over(_LOST_LINK, clean_name(path))
                else:
                    self._places[_plain(path)] = place
                    yield clean_name(path), place[0], self._fetch(place[0], sum(place))
            elif kind in _EMPTY_KINDS:
                self._pass_over(_EMPTY_KINDS[kind], clean_name(path))
            elif kind != b"5":
                self._data(size)
                self._pass_over(f"entry of type {clean_name(kind)!r}", clean_name(path))
            long_name, long_link, attributes = None, None, {}
        self._end()

    def skipped_summary(self) -> str:
        """What was passed over, for a message; '' for nothing."""
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.skipped.most_common())
        return f"{kinds} (the first: {self._first_passed})" if kinds else ""

    def _pass_over(self, kind: str, path: str) -> None:
        self.skipped[kind] += 1
        self._first_passed = self._first_passed or path

    def _stated_size(self, header: bytes, attributes: dict[bytes, bytes]) -> int:
        """The bytes of data that follow a header. Raises DataError for no number, and for more than the tar has."""
        place = self.position - BLOCK
        try:
            size = _decimal(attributes[b"size"]) if b"size" in attributes else _number(header[124:136])
        except ValueError as error:
            remedy = "Restore it or build it again"
            raise self._fault(f"the header at byte {place} states no size ({error}). {remedy}") from None
        if header[156:157] not in b"123456" and size > self._size - self.position:
            raise self._fault(
                f"the shard is truncated or damaged: the header at byte {place} states {size} bytes of data, and "
                f"{max(0, self._size - self.position)} follow it. Copy or build it again"
            )
        return size

    def _header(self) -> bytes | None:
        block = self._read(BLOCK)
        if self.position == len(block) and block.startswith(_PACKED):
            raise self._fault(f"it is compressed and cannot be read by range. {unpack_remedy(self._name)}")
        if len(block) < BLOCK:
            raise self._cut("inside a header" if block else "before the two zero blocks that end a tar")
        if block == bytes(BLOCK):
            return None
        if not _is_header(block):
            place = self.position - BLOCK
            raise self._fault(f"no tar header at byte {place}: it is no tar, or was damaged. Rebuild or restore it")
        return block

    def _pax(self, data: bytes, place: int) -> dict[bytes, bytes]:
        """The records 'length key=value\\n' of an extended header, which begin at `place`; zeros may follow them."""
        found, at = {}, 0
        while at < len(data) and data[at]:
            match = _RECORD.match(data, at)
            stop = at + int(match[1]) if match else 0
            key, equals, value = data[match.end() : stop - 1].partition(b"=") if match else (b"", b"", b"")
            if not equals or not key or data[stop - 1 : stop] != b"\n":
                raise self._fault(f"the extended header at byte {place} is damaged. Restore it or build it again")
            found[key] = value
            at = stop
        return found

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


@contextmanager
def open_tar(storage: Storage, location: str, info: ObjectInfo) -> Iterator[Tar]:
    """A tar of a store, to be walked once; `info` is what the store says of it."""
    with storage.open(location) as stream:
        yield Tar(stream, location, info.size, lambda start, stop: storage.read_range(location, start, stop, info.etag))


def split_key(path: str) -> tuple[str, str]:
    """('folder/0001', 'seg.png') of 'folder/0001.seg.png'; the extension is '' for what is no sample's member."""
    path = path.removeprefix("./")
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem or _is_metadata(path):
        return path, ""
    return folder + slash + stem, extension.lower()


def _is_metadata(path: str) -> bool:
    """Whether webdataset takes a path for its own: `__…__` itself, or what lies in a folder named so at the top."""
    return re.match(r"__[^/]*__(/|$)", path) is not None


def _nameless(path: str) -> str:
    """What a file is whose name gives it no key or no extension."""
    if _is_metadata(path.removeprefix("./")):
        return "file of webdataset's metadata"
    return "hidden file" if path.rpartition("/")[2].startswith(".") else "file without an extension"


def clean_name(name: bytes) -> str:
    """A member's name as text. Bytes that are not UTF-8 are spelled out: b'caf\\xe9' is named 'caf\\\\xe9'.

    Different names stay different (a backslash beside such bytes is doubled), and the same name is always the same.
    """
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def unpack_remedy(name: str) -> str:
    return f"Unpack {name.rpartition('/')[2]} to a plain .tar (gunzip, or zstd -d): images gain nothing by it"


def _is_header(block: bytes) -> bool:
    """Whether the checksum is right: the sum of all bytes, its own as spaces. Old tars sum them as signed numbers."""
    try:
        stated = _number(block[148:156])
    except ValueError:
        return False
    others = block[:148] + block[156:]
    unsigned = sum(others) + 8 * ord(" ")
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in others)


def _number(field: bytes) -> int:
    """A header's number: octal text, or base 256 when the first bit is set (GNU, for 8 GiB and more).

    Raises ValueError for what is neither, and for one below 0.
    """
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ValueError(f"{field.hex()} is below 0")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip(b" ")
    if text.strip(b"01234567"):
        raise ValueError(f"{text!r} is not octal")
    return int(text or b"0", 8)


def _decimal(text: bytes) -> int:
    """Raises ValueError for anything but a number of at most 19 digits."""
    if not re.fullmatch(rb"[0-9]{1,19}", text):
        raise ValueError(f"{text[:40]!r} is no size")
    return int(text)


def _until_zero(data: bytes) -> bytes:
    return data.split(b"\0", 1)[0]


def _path(header: bytes) -> bytes:
    name, prefix = _until_zero(header[:100]), _until_zero(header[345:500])
    is_posix = header[257:263] == b"ustar\0"  # GNU's older layout keeps other things in the prefix's place
    return prefix + b"/" + name if prefix and is_posix else name


def _plain(path: bytes) -> bytes:
    return path.removeprefix(b"./")
