"""Which shards a source has, and where each sample lies in them.

A source is a folder of plain tars, made by this project or by anyone. Beside every tar lies a sidecar
`<shard>.index.npz` (keys, and every member's place), and in the folder one `manifest.json` (every shard's exact
count, size and digest). The tars stay untouched. A shard is whole only when every member is complete and both
zero blocks end it: a tar that was cut anywhere is refused by name.

Samples are as webdataset reads them: consecutive files whose paths agree up to the first dot of the file's name.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from typing import BinaryIO

import numpy as np

from pipeline.config.errors import DataError
from pipeline.data.storage import NotFound, ObjectInfo, Storage, join, split

MANIFEST = "manifest.json"
_VERSION = 1
_BLOCK = 512
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstd


@dataclass(frozen=True)
class ShardRecord:
    """One shard as the manifest knows it."""

    name: str
    samples: int
    bytes: int
    digest: str  # SHA-256 of the tar, hex
    etag: str | None = None  # the store's tag when it was indexed; no part of the manifest's digest, for copies differ


@dataclass(frozen=True)
class Manifest:
    """All shards of a source, sorted by name."""

    shards: tuple[ShardRecord, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of names, counts, sizes and contents: the same for every copy of the same shards."""
        facts = [[shard.name, shard.samples, shard.bytes, shard.digest] for shard in self.shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class ShardIndex:
    """Where a shard's samples lie. N samples, M members; sample i owns members first[i] … first[i+1]-1."""

    keys: tuple[str, ...]  # N
    first: np.ndarray  # (N+1,) int64
    extension: np.ndarray  # (M,) int32 into `extensions`
    offset: np.ndarray  # (M,) int64, of the member's data in the tar
    size: np.ndarray  # (M,) int64
    crc: np.ndarray  # (N,) uint32 of the sample's members' data, end to end
    extensions: tuple[str, ...]
    bytes: int  # of the tar
    digest: str  # SHA-256 of the tar, hex
    etag: str | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> Iterator[tuple[str, int, int]]:
        """(extension, offset, size) of each member of one sample, in the tar's order."""
        for member in range(self.first[sample], self.first[sample + 1]):
            yield self.extensions[self.extension[member]], int(self.offset[member]), int(self.size[member])

    def span(self, sample: int) -> tuple[int, int]:
        """The bytes [start, stop) of the tar that hold the sample's data."""
        members = slice(self.first[sample], self.first[sample + 1])
        return int(self.offset[members][0]), int((self.offset[members] + self.size[members])[-1])

    def to_bytes(self) -> builtins.bytes:
        """The sidecar's content."""
        buffer = io.BytesIO()
        text = {"keys": self.keys, "extensions": self.extensions, "digest": self.digest, "etag": self.etag}
        np.savez_compressed(
            buffer,
            version=_VERSION,
            text=np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
            bytes=self.bytes,
            first=self.first,
            extension=self.extension,
            offset=self.offset,
            size=self.size,
            crc=self.crc,
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: builtins.bytes) -> ShardIndex:
        """Raises ValueError when the data is no sidecar of this version."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                if int(found["version"]) != _VERSION:
                    raise ValueError(f"index version {int(found['version'])}, expected {_VERSION}")
                text = json.loads(found["text"].tobytes())
                arrays = {name: found[name] for name in ("first", "extension", "offset", "size", "crc")}
                num_bytes = int(found["bytes"])
        except (KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"not an index: {error}") from error
        return ShardIndex(
            keys=tuple(text["keys"]),
            extensions=tuple(text["extensions"]),
            digest=text["digest"],
            etag=text["etag"],
            bytes=num_bytes,
            **arrays,
        )


def load_manifest(storage: Storage, url: str) -> Manifest:
    """The manifest of a folder of shards, or of the shards a brace pattern names ('…/{0000..0095}.tar').

    Raises DataError when the folder, the manifest or a named shard is missing, or nothing is in it.
    """
    folder, chosen = _folder_and_names(url)
    location = join(folder, MANIFEST)
    try:
        data = storage.read(location)
    except NotFound as error:
        if "bucket '" in str(error):
            raise
        if not storage.exists(folder):
            raise DataError(f"{url}: no such folder of shards. Correct it, or run mome shards build") from error
        raise DataError(f"{url}: no {MANIFEST} in it. Make it from the tars: mome shards index {url}") from error
    manifest = _parse_manifest(data, location)
    if chosen is not None:
        by_name = {shard.name: shard for shard in manifest.shards}
        if absent := [name for name in chosen if name not in by_name]:
            raise DataError(f"{url}: {absent[0]} is not in {location} ({len(absent)} such): mome shards index {url}")
        manifest = Manifest(tuple(by_name[name] for name in sorted(set(chosen))))
    if not manifest.num_samples:
        raise DataError(f"{url}: its shards hold no samples. Add tars that do, then mome shards index {url}")
    return manifest


def shard_folder(url: str) -> str:
    """The folder that holds the shards of a source: `url` itself, or where its brace pattern or tar lies."""
    return _folder_and_names(url)[0]


def check_present(storage: Storage, url: str, manifest: Manifest) -> dict[str, ObjectInfo]:
    """What the store says of each shard, by one listing. Raises DataError when one is missing or of another size."""
    folder = shard_folder(url)
    found = storage.list_info(folder)
    for shard in manifest.shards:
        location = join(folder, shard.name)
        if shard.name not in found:
            raise DataError(f"{location}: the shard is missing. Put it back, or run mome shards index {url} again")
        check_size(location, shard, found[shard.name].size)
    return {shard.name: found[shard.name] for shard in manifest.shards}


def check_size(location: str, shard: ShardRecord, size: int) -> None:
    """Raises DataError when the tar's size is not the manifest's."""
    if size != shard.bytes:
        fault = "truncated" if size < shard.bytes else "changed"
        raise DataError(
            f"{location}: the shard was {fault}: {size} bytes where its manifest says {shard.bytes}. "
            "Restore it, or index the folder again (mome shards index) and start a new run"
        )


def load_index(storage: Storage, url: str, record: ShardRecord) -> ShardIndex:
    """The index of one shard of the folder or pattern `url`. Raises DataError when it is missing or of another tar."""
    folder = shard_folder(url)
    location = join(folder, f"{record.name}.index.npz")
    try:
        index = ShardIndex.from_bytes(storage.read(location))
    except NotFound as error:
        raise DataError(f"{location}: the index is missing. Run mome shards index {url}") from error
    except ValueError as error:
        raise DataError(f"{location}: {error}. Delete it and run mome shards index {url}") from error
    if (index.digest, index.bytes, len(index)) != (record.digest, record.bytes, record.samples):
        raise DataError(f"{location}: belongs to another version of the shard. Run mome shards index {url}")
    return index


def index_shards(storage: Storage, url: str, progress: Callable[[int, int, str], None] | None = None) -> Manifest:
    """Writes the sidecars and the manifest of a folder (or brace pattern) of tars, and returns the manifest.

    An index that still fits its tar is kept, so that an interrupted call continues where it stopped. `progress` is
    told (shards done, shards in all, name). Raises DataError, by name, for a tar that is cut or cannot be read.
    """
    folder, chosen = _folder_and_names(url)
    found = storage.list_info(folder)
    names = sorted(set(chosen)) if chosen is not None else [name for name in found if name.endswith(".tar")]
    if not names:
        packed = next((name for name in found if re.search(r"\.(tgz|tar\.\w+)$", name)), None)
        remedy = _unpack_remedy(packed) if packed else "Put tars there, or correct the URL"
        raise DataError(f"{url}: no .tar files there. {remedy}")
    shards = []
    for done, name in enumerate(names):
        if name not in found:
            raise DataError(f"{join(folder, name)}: the shard is missing. Put it there, or correct the pattern {url}")
        index = _index_one(storage, join(folder, name), found[name], f"{name}.index.npz" in found)
        shards.append(ShardRecord(name, len(index), index.bytes, index.digest, index.etag))
        if progress:
            progress(done + 1, len(names), name)
    manifest = Manifest(tuple(shards))
    content = {"version": _VERSION, "digest": manifest.digest, "shards": [asdict(shard) for shard in shards]}
    storage.write(join(folder, MANIFEST), json.dumps(content, indent=1).encode())
    return manifest


def _index_one(storage: Storage, location: str, info: ObjectInfo, has_sidecar: bool) -> ShardIndex:
    sidecar = f"{location}.index.npz"
    if has_sidecar:
        try:
            index = ShardIndex.from_bytes(storage.read(sidecar))
            if index.bytes == info.size and index.etag is not None and index.etag == info.etag:
                return index
        except ValueError:
            pass  # an older version's, or not whole: made anew
    with storage.open(location) as stream:
        index = index_tar(stream, location, info.etag)
    storage.write(sidecar, index.to_bytes())
    return index


def index_tar(source: bytes | BinaryIO, name: str, etag: str | None = None) -> ShardIndex:
    """Indexes a tar by walking its headers. Raises DataError, with `name`, for anything but a whole, plain tar."""
    tar = _Tar(io.BytesIO(source) if isinstance(source, bytes) else source, name)
    keys: list[str] = []
    first: list[int] = []
    members: list[tuple[str, int, int]] = []
    crcs: list[int] = []
    for path, offset, data in tar.files():
        key, extension = split_key(path)
        if not extension:
            continue
        if not keys or keys[-1] != key:
            keys.append(key)
            first.append(len(members))
            crcs.append(0)
        elif any(extension == other for other, _, _ in members[first[-1] :]):
            raise DataError(f"{name}: sample '{key}' has two members '.{extension}'. Give every sample its own key")
        members.append((extension, offset, len(data)))
        crcs[-1] = zlib.crc32(data, crcs[-1])
    extensions = sorted({extension for extension, _, _ in members})
    code = {extension: number for number, extension in enumerate(extensions)}
    return ShardIndex(
        keys=tuple(keys),
        first=np.array([*first, len(members)], dtype=np.int64),
        extension=np.array([code[extension] for extension, _, _ in members], dtype=np.int32),
        offset=np.array([offset for _, offset, _ in members], dtype=np.int64),
        size=np.array([size for _, _, size in members], dtype=np.int64),
        crc=np.array(crcs, dtype=np.uint32),
        extensions=tuple(extensions),
        bytes=tar.position,
        digest=tar.digest.hexdigest(),
        etag=etag,
    )


def split_key(path: str) -> tuple[str, str]:
    """('folder/0001', 'seg.png') of 'folder/0001.seg.png'; the extension is '' for what is no sample's member."""
    path = path.removeprefix("./")
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem or stem.startswith("__"):  # hidden files; webdataset's own metadata
        return path, ""
    return folder + slash + stem, extension.lower()


class _Tar:
    """A tar read once from front to back: ustar, GNU and PAX, long names and large files included."""

    def __init__(self, stream: BinaryIO, name: str):
        self._stream, self._name = stream, name
        self.position = 0
        self.digest = hashlib.sha256()

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
        block = self._read(_BLOCK)
        if self.position == len(block) and block.startswith(_PACKED):
            raise self._fault(f"it is compressed and cannot be read by range. {_unpack_remedy(self._name)}")
        if len(block) < _BLOCK:
            raise self._cut("inside a header" if block else "before the two zero blocks that end a tar")
        if block == bytes(_BLOCK):
            return None
        unsigned = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
        try:
            stated = _number(block[148:156])
        except ValueError:
            stated = -1
        if stated != unsigned:
            place = self.position - _BLOCK
            raise self._fault(f"no tar header at byte {place}: it is no tar, or was damaged. Rebuild or restore it")
        return block

    def _data(self, size: int) -> bytes:
        padded = -(-size // _BLOCK) * _BLOCK
        data = self._read(padded)
        if len(data) < padded:
            raise self._cut("inside a member's data")
        return data[:size]

    def _end(self) -> None:
        if self._read(_BLOCK) != bytes(_BLOCK):
            raise self._cut("between the two zero blocks that end a tar")
        while rest := self._read(1 << 20):
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


def expand_braces(pattern: str) -> list[str]:
    """'a-{00..02}.{x,y}' → every name it stands for, in order. Digits keep their width."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if number % 2 == 0 else _choices(piece) for number, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not bounds:
        return inside.split(",")
    low, high = bounds.groups()
    return [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]


def _folder_and_names(url: str) -> tuple[str, list[str] | None]:
    """The folder, and the shards' names when the URL names some: a brace pattern or a single tar."""
    if "{" not in url and not re.search(r"\.(tar|tgz|tar\.\w+)$", url):
        return url, None
    folder, name = split(url)
    if "{" in folder:
        raise DataError(f"{url}: braces may stand in the shards' names only, not in the folder. Name one folder")
    return folder, expand_braces(name)


def _parse_manifest(data: bytes, location: str) -> Manifest:
    try:
        content = json.loads(data)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}, expected {_VERSION}")
        manifest = Manifest(tuple(ShardRecord(**shard) for shard in content["shards"]))
        if manifest.digest != content["digest"]:
            raise ValueError("its own digest does not fit its shards; it was edited or damaged")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{location}: no manifest of shards ({error}). Make it again: mome shards index") from error
    return manifest


def _unpack_remedy(name: str) -> str:
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
