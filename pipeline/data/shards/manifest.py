"""Manifest of a folder of plain tars: `manifest.json` has every shard's exact count, size and digest. The index of a
tar is stored next to it as `<shard>.index.npz`; the tars themselves are not changed. A tar need not be read if another
tool has counted its samples (`--trust-counts`); the count is checked against the tar's size, and against the tar when
that is first read. Such counts are in one of these files:

- Megatron-Energon's `<shard>.tar.idx`: little-endian uint64 offsets of each sample's first header, then of the end
- DALI's `<shard>.idx` (wds2idx, v1.0 to v1.2): 'v1.2 N', then one line of '<extension> <offset> <size> …' a sample
- img2dataset's `<shard>_stats.json`: `successes` is the number of samples that it wrote
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from pipeline.config.errors import ConfigError, DataError, StorageError
from pipeline.config.urls import is_local, local_path
from pipeline.data.shards.index import SIDECAR, TRUSTED, ShardIndex, ShardRecord, index_tar, open_sidecar
from pipeline.data.shards.tar import BLOCK, UNPACK, open_tar
from pipeline.data.storage import NotFound, ObjectInfo, Progress, Storage, in_parallel, join, split

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_VERSION = 2
_index_locks = tuple(threading.Lock() for _ in range(64))  # so that threads index a trusted shard once
_DALI_WORDS = {"v1.0": 3, "v1.1": 3, "v1.2": 4}  # per member in a line
_OTHER_TAR = re.compile(r"(.*)\.(tgz|tbz2?|txz|tzst|tar(\.(gz|bz2|xz|zst|zstd|lz4|lzma|z))?)", re.IGNORECASE)


@dataclass
class Manifest:
    """All shards of a source, sorted by name."""

    shards: tuple[ShardRecord, ...]
    num_samples: int = field(init=False)
    digest: str = field(init=False)  # SHA-256 (hex) of names, counts, sizes and contents, equal for every copy of them

    def __post_init__(self) -> None:
        self.num_samples = sum(shard.samples for shard in self.shards)
        facts = [[shard.name, shard.samples, shard.bytes, shard.digest] for shard in self.shards]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class ShardPattern(NamedTuple):
    folder: str
    names: tuple[str, ...] | None = None  # of the tars, in the pattern's order; None: all of the folder


@lru_cache(maxsize=16)  # callers parse a source's URL again for each of its shards
def parse_pattern(url: str) -> ShardPattern:
    """Parse the URL of a folder, a tar or a brace pattern: 'folder/a-{00..02}.{x,y}.tar'."""
    if url.startswith("pipe:"):
        raise ConfigError(f"{url}: a pipe: URL runs a command, which data may not do. Name the folder of the tars")
    if "{" not in url and not re.search(r"\.(tar|tgz|tar\.\w+)$", url):
        return ShardPattern(url)
    folder, name = split(url)
    if "{" in folder:
        raise DataError(f"{url}: braces are allowed in the shards' names only, not in the folder. Name one folder")
    choices: list[list[str]] = []
    for number, piece in enumerate(re.split(r"\{([^{}]*)\}", name)):
        in_braces = number % 2 == 1
        if in_braces and (bounds := re.fullmatch(r"(\d+)\.\.(\d+)", piece)):
            low, high = bounds.groups()
            choices.append([f"{value:0{len(low)}d}" for value in range(int(low), int(high) + 1)])
        else:
            choices.append(piece.split(",") if in_braces else [piece])
    return ShardPattern(folder, tuple("".join(combination) for combination in product(*choices)))


def load_manifest(storage: Storage, url: str) -> Manifest:
    """Load the manifest of a folder or pattern; raise DataError if it, a named shard or every sample is missing."""
    folder, pattern = parse_pattern(url)
    try:
        manifest = _read_manifest(storage, folder, pattern)
    except NotFound as error:
        if "bucket '" in str(error):
            raise
        if not storage.exists(folder):
            raise DataError(f"{url}: no such folder of shards. Correct it, or run mome shards build") from error
        raise DataError(f"{url}: no {MANIFEST} in it. Make it from the tars: mome shards index {url}") from error
    if absent := set(pattern or ()).difference(shard.name for shard in manifest.shards):
        location = join(folder, MANIFEST)
        raise DataError(f"{url}: {min(absent)} is not in {location} ({len(absent)} such): mome shards index {url}")
    if not manifest.num_samples:
        raise DataError(f"{url}: its shards have no samples. Add tars that do, then mome shards index {url}")
    return manifest


def ensure_indexed(storage: Storage, url: str, progress: Progress | None = None) -> Manifest:
    """Load a source's manifest, indexing first if it is incomplete. Raises DataError for a missing or resized shard."""
    folder, pattern = parse_pattern(url)
    objects = storage.list_info(folder)
    if MANIFEST in objects:
        manifest = _read_manifest(storage, folder, pattern)
        check_present(storage, url, manifest, objects)
        expected = [name for name in objects if name.endswith(".tar")] if pattern is None else pattern
        is_indexed = all(shard.is_trusted or shard.name + SIDECAR in objects for shard in manifest.shards)
        if manifest.num_samples and is_indexed and not set(expected) - {shard.name for shard in manifest.shards}:
            return manifest
    index_shards(storage, url, progress)
    return load_manifest(storage, url)


def index_shards(storage: Storage, url: str, progress: Progress | None = None, trust_counts: bool = False) -> Manifest:
    """Write the sidecars and the manifest of a folder (or brace pattern) of tars, and return the manifest. A shard that
    the manifest or a valid sidecar describes is not read again, so that an interrupted call continues; with
    `trust_counts`, nor is one that another tool counted. Raises DataError, naming the tar, for a damaged one.
    """
    folder, pattern = parse_pattern(url)
    objects = storage.list_info(folder)
    names = shard_names(url, objects)
    if absent := next((name for name in names if name not in objects), None):
        raise DataError(f"{join(folder, absent)}: the shard is missing. Put it there, or correct the pattern {url}")
    stored, records, selected = Manifest(()), dict[str, ShardRecord](), set(names)
    with suppress(DataError):  # damaged, or of another version: made again
        stored = _read_manifest(storage, folder) if MANIFEST in objects else stored
    for shard in stored.shards:
        info = objects.get(shard.name)
        is_unchanged = info is not None and info.etag is not None and info == ObjectInfo(shard.bytes, shard.etag)
        is_indexed = trust_counts if shard.is_trusted else shard.name + SIDECAR in objects
        # The folder's shards that the pattern does not name stay in the manifest.
        if (is_unchanged and is_indexed) if shard.name in selected else pattern is not None:
            records[shard.name] = shard

    def make_record(name: str) -> ShardRecord:
        info, location = objects[name], join(folder, name)
        if name + SIDECAR in objects:
            with (
                suppress(ValueError),  # damaged, or of an older version: made again
                open_sidecar(storage.read(location + SIDECAR), name) as (_, record),
            ):
                if info.etag is not None and info == ObjectInfo(record.bytes, record.etag):
                    return record
        if trust_counts and info.etag is not None:
            samples = _trusted_count(storage, folder, name, info.size, objects)
            if samples is not None:
                return ShardRecord(name, samples, info.size, f"{TRUSTED}{info.etag}:{info.size}", info.etag)
        with open_tar(storage, location, info) as tar:
            index = index_tar(tar, info.etag)
        _write(storage, location + SIDECAR, index.to_bytes())
        return ShardRecord(name, len(index), index.bytes, index.digest, index.etag)

    new = [name for name in names if name not in records]
    for done, (name, record) in enumerate(in_parallel(make_record, new, folder), len(names) - len(new) + 1):
        records[name] = record
        if progress:
            progress(done, len(names), name)
    manifest = Manifest(tuple(records[name] for name in sorted(records)))
    if manifest != stored:
        content = {"version": _VERSION, "digest": manifest.digest, "shards": [asdict(s) for s in manifest.shards]}
        _write(storage, join(folder, MANIFEST), json.dumps(content, indent=1).encode())
    return Manifest(tuple(shard for shard in manifest.shards if shard.name in selected))


def load_index(storage: Storage, url: str, record: ShardRecord) -> ShardIndex:
    """Load the index of a shard, or index a trusted shard on first use. Raises DataError unless it fits the record."""
    location = join(parse_pattern(url).folder, record.name)
    sidecar = location + SIDECAR
    if not record.is_trusted:
        try:
            index = ShardIndex.from_bytes(storage.read(sidecar))
        except NotFound as error:
            raise DataError(f"{sidecar}: the index is missing. Run mome shards index {url}") from error
        except ValueError as error:
            raise DataError(f"{sidecar}: {error}. Delete it and run mome shards index {url}") from error
        if (index.digest, index.bytes, len(index)) != (record.digest, record.bytes, record.samples):
            raise DataError(f"{sidecar}: belongs to another version of the shard. Run mome shards index {url}")
        return index
    with _index_locks[hash(location) % len(_index_locks)]:
        info = storage.info(location)
        if info != ObjectInfo(record.bytes, record.etag):
            raise DataError(f"{location}: the shard was changed since it was counted. Run mome shards index again")
        saved = None
        with suppress(NotFound, ValueError):
            saved = ShardIndex.from_bytes(storage.read(sidecar))
        if saved is not None and (saved.bytes, saved.etag) == (info.size, info.etag):
            index = saved
        else:
            with open_tar(storage, location, info) as tar:
                index = index_tar(tar, info.etag)
            try:
                storage.write(sidecar, index.to_bytes())
            except StorageError as error:
                log.warning("%s: its index could not be saved and will be made again: %s", location, error)
        if len(index) != record.samples:
            fault = f"it has {len(index)} samples, and the index of another tool said {record.samples}"
            raise DataError(f"{location}: {fault}. Count them: mome shards index, without --trust-counts")
        return index


def check_present(
    storage: Storage, url: str, manifest: Manifest, objects: Mapping[str, ObjectInfo] | None = None
) -> dict[str, ObjectInfo]:
    """Return the store's info on each shard, from one listing. Raise DataError if a shard is missing or resized."""
    folder = parse_pattern(url).folder
    objects = storage.list_info(folder) if objects is None else objects
    for shard in manifest.shards:
        location = join(folder, shard.name)
        if shard.name not in objects:
            raise DataError(f"{location}: the shard is missing. Put it back, or run mome shards index {url} again")
        check_size(location, shard, objects[shard.name].size)
    return {shard.name: objects[shard.name] for shard in manifest.shards}


def check_size(location: str, shard: ShardRecord, size: int) -> None:
    """Raise DataError if a tar's size is not the manifest's."""
    if size != shard.bytes:
        fault = "truncated" if size < shard.bytes else "changed"
        remedy = "Restore it, or index the folder again (mome shards index) and start a new run"
        raise DataError(f"{location}: the shard was {fault}: {size} bytes; its manifest says {shard.bytes}. {remedy}")


def shard_names(url: str, objects: Mapping[str, ObjectInfo]) -> list[str]:
    """Return the sorted names of a folder's or pattern's tars, given the folder's objects. Raise DataError for none."""
    pattern = parse_pattern(url).names
    names = sorted(name for name in objects if name.endswith(".tar")) if pattern is None else sorted(set(pattern))
    # A compressed or oddly named tar is not read: a fault unless it has a plain tar of the same name.
    others = (_OTHER_TAR.fullmatch(name) for name in sorted(objects) if not name.endswith(".tar"))
    other = next((match[0] for match in others if match and f"{match[1]}.tar" not in objects), None)
    remedy = "Put tars there (mome shards build), or correct the URL"
    if other:
        is_tar = other.lower().endswith(".tar")
        remedy = f"Rename {other}: shards' names end in .tar" if is_tar else UNPACK.format(other)
    if not names:
        fault = "no .tar files there" if objects else "no such folder of shards, or it is empty"
        raise DataError(f"{url}: {fault}. {remedy}")
    if pattern is None and other:
        remedy = f"{remedy}. Or move it away, or name the shards to be read by a pattern: …/{{0000..0095}}.tar"
        raise DataError(f"{url}: {other} would not be read along with {names[0]}. {remedy}")
    if pattern is None and is_local(url):  # a listing leaves out broken links
        folder = local_path(url)
        absent = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and name not in objects)
        if broken := next((name for name in absent if not (folder / name).exists()), None):
            raise DataError(f"{join(url, broken)}: a link to a missing file. Put that file back, or remove the link")
    return names


def _write(storage: Storage, location: str, data: bytes) -> None:
    try:
        storage.write(location, data)
    except StorageError as error:
        remedy = "give write access to the folder, or index a writable copy of it."
        raise StorageError(f"{error} Indexing writes a {SIDECAR} for every tar, and {MANIFEST}: {remedy}") from error


def _read_manifest(storage: Storage, folder: str, names: Collection[str] | None = None) -> Manifest:
    """Read a folder's manifest, restricted to `names`. Raise DataError, naming it, for an invalid or forged one."""
    location = join(folder, MANIFEST)
    data = storage.read(location)
    try:
        content = json.loads(data)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}, expected {_VERSION}")
        shards = tuple(ShardRecord(**shard) for shard in content["shards"])
        for shard in shards:
            name, sizes = shard.name, (shard.samples, shard.bytes)
            if not all(isinstance(text, str) for text in (name, shard.digest, shard.etag or "")):
                raise TypeError(f"names and digests are texts, not {name!r:.80}")
            if "/" in name or "\0" in name or name in ("", ".", ".."):
                raise ValueError(f"{name!r:.80} is not the name of a file in the folder")
            name.encode()
            if not (all(type(n) is int and n < 2**63 for n in sizes) and 0 <= shard.samples * BLOCK <= shard.bytes):
                raise ValueError(f"{name}: {sizes[0]!r:.40} samples in {sizes[1]!r:.40} bytes")
        manifest = Manifest(shards)
        if manifest.digest != content["digest"]:
            raise ValueError("its digest does not fit its shards; it was edited or damaged")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{location}: not a manifest of shards ({error}). Make it again: mome shards index") from error
    selected = set(names or ())
    return manifest if names is None else Manifest(tuple(shard for shard in shards if shard.name in selected))


def _trusted_count(storage: Storage, folder: str, tar: str, size: int, names: Collection[str]) -> int | None:
    """Return the samples of a tar by another tool's file, or None. Raise DataError if it does not fit `size` bytes."""
    stem = tar.removesuffix(".tar")
    energon, dali, img2dataset = f"{tar}.idx", f"{stem}.idx", f"{stem}_stats.json"
    name = next((name for name in (energon, dali, img2dataset) if name in names), None)
    if name is None:
        return None
    location = join(folder, name)
    data = storage.read(location)
    try:
        if name == energon:
            if len(data) < 8 or len(data) % 8:
                raise ValueError(f"{len(data)} bytes are not a list of 8-byte offsets")
            offsets = np.frombuffer(data, dtype="<u8").astype(np.int64)
            if (offsets < 0).any() or (offsets % BLOCK).any() or (np.diff(offsets) <= 0).any():
                raise ValueError("its offsets are not increasing multiples of 512")
            samples, end = len(offsets) - 1, int(offsets[-1])
        elif name == dali:
            (version, stated), *lines = map(str.split, data.decode().splitlines())
            if version not in _DALI_WORDS:
                raise ValueError(f"version {version}; expected {', '.join(_DALI_WORDS)}")
            samples, end, per_member = len(lines), 0, _DALI_WORDS[version]
            if samples != int(stated):
                raise ValueError(f"it states {stated} samples and lists {samples}")
            for number, words in enumerate(lines, 2):
                if not words or len(words) % per_member:
                    raise ValueError(f"line {number} is not a list of members")
                for offset, length in zip(words[1::per_member], words[2::per_member], strict=True):
                    if int(offset) % BLOCK or int(length) < 0:
                        raise ValueError(f"line {number}: no member has {length} bytes at byte {offset}")
                    end = max(end, int(offset) + int(length))
        else:
            samples = json.loads(data)["successes"]
            if type(samples) is not int or samples < 0:
                raise ValueError(f"{samples!r:.50} is not a number of samples")
            end = 2 * samples * BLOCK
        if end + 2 * BLOCK > size:
            raise ValueError(f"{samples} samples end at byte {end}, the tar with its end blocks at {size}")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        remedy = "Delete it or make it again, or run mome shards index without --trust-counts"
        raise DataError(f"{location}: it does not fit {tar} ({error}). {remedy}") from error
    return samples
