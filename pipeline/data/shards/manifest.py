"""Which shards a source has: the manifest of a folder of plain tars, made by this project or by anyone.

Beside every tar lies its index, `<shard>.index.npz`, and in the folder one `manifest.json` with every shard's exact
count, size and digest. The tars stay untouched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from pipeline.config.errors import ConfigError, DataError, StorageError
from pipeline.config.urls import is_local, local_path
from pipeline.data.parallel import Progress, in_parallel
from pipeline.data.shards.index import SIDECAR, ShardFacts, ShardIndex, index_walk, sidecar_facts
from pipeline.data.shards.tar import BLOCK, open_tar, unpack_remedy
from pipeline.data.storage import NotFound, ObjectInfo, Storage, join, split

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_VERSION = 2
_TRUSTED = "etag:"  # begins the digest of a shard whose content was not read
_making = tuple(threading.Lock() for _ in range(64))  # of trusted shards' indexes: threads make one once


@dataclass(frozen=True)
class ShardRecord:
    """One shard as the manifest knows it."""

    name: str
    samples: int
    bytes: int
    digest: str  # SHA-256 of the tar, hex; 'etag:<etag>:<bytes>' while its count is another tool's word
    etag: str | None = None  # the store's tag when it was indexed; no part of the manifest's digest, for copies differ

    @property
    def is_trusted(self) -> bool:
        """Counted by another tool and never read: its index is made when it is first asked for."""
        return self.digest.startswith(_TRUSTED)


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
        known = {shard.name for shard in manifest.shards}
        if absent := [name for name in chosen if name not in known]:
            raise DataError(f"{url}: {absent[0]} is not in {location} ({len(absent)} such): mome shards index {url}")
    return _with_samples(url, _only(manifest, chosen))


def ensure_indexed(storage: Storage, url: str, progress: Progress | None = None) -> Manifest:
    """The manifest of a source; made first where there is none, or where tars lie there without a place in it.

    Shards that it lists must lie there at their size: a missing or cut one raises DataError, by name. No byte is read
    of them. Raises StorageError when there is something to index and the folder cannot be written.
    """
    folder, chosen = _folder_and_names(url)
    found = storage.list_info(folder)
    stored = _stored_manifest(storage, folder, found)
    if stored is not None:
        manifest = _only(stored, chosen)
        _check_found(url, manifest, found)
        is_complete = {shard.name for shard in manifest.shards}.issuperset(_tars(found) if chosen is None else chosen)
        if is_complete and all(shard.is_trusted or shard.name + SIDECAR in found for shard in manifest.shards):
            return _with_samples(url, manifest)
    return _with_samples(url, index_shards(storage, url, progress))


def shard_folder(url: str) -> str:
    """The folder that holds the shards of a source: `url` itself, or where its brace pattern or tar lies."""
    return _folder_and_names(url)[0]


def shard_names(url: str, found: Mapping[str, ObjectInfo]) -> list[str]:
    """The tars that a folder or pattern means, sorted, given what lies in the folder. Raises DataError for none."""
    chosen = _folder_and_names(url)[1]
    names = sorted(set(chosen)) if chosen is not None else _tars(found)
    other = next((name for name in sorted(found) if _is_other_tar(name, found)), None)
    if not names:
        remedy = _other_remedy(other) if other else "Put tars there, or correct the URL"
        raise DataError(f"{url}: no .tar files there. {remedy}")
    if chosen is None and other is not None:
        raise DataError(
            f"{url}: {other} would not be read beside {names[0]}. {_other_remedy(other)}. Or move it away, or name the "
            "shards that are to be read by a pattern: …/{0000..0095}.tar"
        )
    if chosen is None and (lost := _lost_link(url, found)) is not None:
        raise DataError(
            f"{join(url, lost)}: a link to a file that does not exist. Put that file back, or remove the link"
        )
    return names


def _lost_link(url: str, found: Collection[str]) -> str | None:
    """Return a link to a tar that is not there, which listings leave out; None for folders without one."""
    if not is_local(url):
        return None
    folder = local_path(url)
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and name not in found)
    return next((name for name in names if not (folder / name).exists()), None)


def _is_other_tar(name: str, found: Collection[str]) -> bool:
    """Whether a file is a tar that is not read, for its name does not end in .tar, and no plain tar of its name lies
    beside it."""
    match = re.fullmatch(r"(.*)\.(tgz|tbz2?|txz|tzst|tar(\.(gz|bz2|xz|zst|zstd|lz4|lzma|z))?)", name, re.IGNORECASE)
    return match is not None and not name.endswith(".tar") and f"{match[1]}.tar" not in found


def _other_remedy(name: str) -> str:
    return unpack_remedy(name) if not name.lower().endswith(".tar") else f"Rename {name}: shards' names end in .tar"


def check_present(storage: Storage, url: str, manifest: Manifest) -> dict[str, ObjectInfo]:
    """What the store says of each shard, by one listing. Raises DataError when one is missing or of another size."""
    found = storage.list_info(shard_folder(url))
    _check_found(url, manifest, found)
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
    """The index of one shard of the folder or pattern `url`; a trusted shard's is made when it is first asked for.

    Raises DataError when it is missing or of another tar, or when a trusted shard does not hold what was stated.
    """
    location = join(shard_folder(url), record.name)
    if record.is_trusted:
        with _making[hash(location) % len(_making)]:
            return _trusted_index(storage, location, record)
    sidecar = location + SIDECAR
    try:
        index = ShardIndex.from_bytes(storage.read(sidecar))
    except NotFound as error:
        raise DataError(f"{sidecar}: the index is missing. Run mome shards index {url}") from error
    except ValueError as error:
        raise DataError(f"{sidecar}: {error}. Delete it and run mome shards index {url}") from error
    if (index.digest, index.bytes, len(index)) != (record.digest, record.bytes, record.samples):
        raise DataError(f"{sidecar}: belongs to another version of the shard. Run mome shards index {url}")
    return index


def index_shards(
    storage: Storage, url: str, progress: Progress | None = None, *, trust_counts: bool = False
) -> Manifest:
    """Writes the sidecars and the manifest of a folder (or brace pattern) of tars, and returns the manifest.

    Shards are indexed in parallel. What still fits its tar is kept, so that an interrupted call continues where it
    stopped, and a shard that the manifest knows is not looked at again. With `trust_counts` neither is one that
    another tool counted (`foreign_index`). `progress` is told (shards done, shards in all, name). Raises DataError,
    by name, for a tar that is cut or cannot be read.
    """
    folder, chosen = _folder_and_names(url)
    found = storage.list_info(folder)
    names = shard_names(url, found)
    if absent := [name for name in names if name not in found]:
        raise DataError(f"{join(folder, absent[0])}: the shard is missing. Put it there, or correct the pattern {url}")
    try:
        stored = _stored_manifest(storage, folder, found)
    except DataError:
        stored = None  # damaged: made anew
    records = _known_records(stored, names, found, trust_counts, keep_others=chosen is not None)
    new = [name for name in names if name not in records]
    made = in_parallel(lambda name: _record(storage, folder, name, found, trust_counts), new, folder)
    for done, (name, record) in enumerate(made, len(names) - len(new) + 1):
        records[name] = record
        if progress:
            progress(done, len(names), name)
    manifest = Manifest(tuple(records[name] for name in sorted(records)))
    if manifest != stored:
        content = {"version": _VERSION, "digest": manifest.digest, "shards": [asdict(s) for s in manifest.shards]}
        _write_beside(storage, join(folder, MANIFEST), json.dumps(content, indent=1).encode())
    return _only(manifest, chosen)


def _known_records(
    stored: Manifest | None,
    names: list[str],
    found: Mapping[str, ObjectInfo],
    trust_counts: bool,
    keep_others: bool,
) -> dict[str, ShardRecord]:
    """What need not be looked at again. A pattern is indexed beside the folder's other shards, which stay listed."""
    wanted = set(names)
    shards = stored.shards if stored else ()
    return {
        shard.name: shard
        for shard in shards
        if (
            _is_current(shard, found) and (trust_counts or not shard.is_trusted)
            if shard.name in wanted
            else keep_others
        )
    }


def _is_current(shard: ShardRecord, found: Mapping[str, ObjectInfo]) -> bool:
    """Whether the tar is the one that was indexed, and its index lies beside it where there must be one."""
    info = found.get(shard.name)
    has_index = shard.is_trusted or shard.name + SIDECAR in found
    return info is not None and has_index and info.etag is not None and info == ObjectInfo(shard.bytes, shard.etag)


def _record(
    storage: Storage, folder: str, name: str, found: Mapping[str, ObjectInfo], trust_counts: bool
) -> ShardRecord:
    info, location = found[name], join(folder, name)
    facts = _current_facts(storage, location, info) if name + SIDECAR in found else None
    if facts is None and trust_counts and info.etag is not None:
        samples = trusted_count(storage, folder, name, info.size, found.keys())
        if samples is not None:
            return ShardRecord(name, samples, info.size, f"{_TRUSTED}{info.etag}:{info.size}", info.etag)
    if facts is None:
        index = _make_index(storage, location, info)
        _write_beside(storage, location + SIDECAR, index.to_bytes())
        facts = index.facts
    return ShardRecord(name, facts.samples, facts.bytes, facts.digest, facts.etag)


def _current_facts(storage: Storage, location: str, info: ObjectInfo) -> ShardFacts | None:
    try:
        facts = sidecar_facts(storage.read(location + SIDECAR))
    except ValueError:
        return None  # an older version's, or not whole: made anew
    return facts if info.etag is not None and info == ObjectInfo(facts.bytes, facts.etag) else None


def _make_index(storage: Storage, location: str, info: ObjectInfo) -> ShardIndex:
    with open_tar(storage, location, info) as tar:
        index = index_walk(tar, info.etag)
    if told := tar.skipped_summary():
        log.warning("%s: passed over, for they are no sample's: %s", location, told)
    return index


def _write_beside(storage: Storage, location: str, data: bytes) -> None:
    try:
        storage.write(location, data)
    except StorageError as error:
        raise StorageError(
            f"{error} Indexing writes a {SIDECAR} file beside every tar, and {MANIFEST}: give write access to the "
            "folder, or index a copy of it that can be written."
        ) from error


def _trusted_index(storage: Storage, location: str, record: ShardRecord) -> ShardIndex:
    info = storage.info(location)
    if info != ObjectInfo(record.bytes, record.etag):
        raise DataError(f"{location}: the shard was changed since it was counted. Run mome shards index again")
    try:
        index = ShardIndex.from_bytes(storage.read(location + SIDECAR))
    except (NotFound, ValueError):
        index = None
    if index is None or index.facts.etag != info.etag or index.bytes != info.size:
        index = _make_index(storage, location, info)
        try:
            storage.write(location + SIDECAR, index.to_bytes())
        except StorageError as error:
            log.warning("%s: its index could not be kept and will be made again: %s", location, error)
    if len(index) != record.samples:
        raise DataError(
            f"{location}: it holds {len(index)} samples, and the index of another tool said {record.samples}. "
            "Count it properly: mome shards index, without --trust-counts"
        )
    return index


def _stored_manifest(storage: Storage, folder: str, found: Mapping[str, ObjectInfo]) -> Manifest | None:
    """The manifest that lies in the folder; None when there is none of this version."""
    if MANIFEST not in found:
        return None
    location = join(folder, MANIFEST)
    data = storage.read(location)
    return None if _version_of(data) == 1 else _parse_manifest(data, location)


def _check_found(url: str, manifest: Manifest, found: Mapping[str, ObjectInfo]) -> None:
    folder = shard_folder(url)
    for shard in manifest.shards:
        location = join(folder, shard.name)
        if shard.name not in found:
            raise DataError(f"{location}: the shard is missing. Put it back, or run mome shards index {url} again")
        check_size(location, shard, found[shard.name].size)


def _tars(found: Mapping[str, ObjectInfo]) -> list[str]:
    return [name for name in found if name.endswith(".tar")]


def _only(manifest: Manifest, chosen: list[str] | None) -> Manifest:
    """The shards of a pattern; of a folder, all."""
    if chosen is None:
        return manifest
    names = set(chosen)
    return Manifest(tuple(shard for shard in manifest.shards if shard.name in names))


def _with_samples(url: str, manifest: Manifest) -> Manifest:
    if not manifest.num_samples:
        raise DataError(f"{url}: its shards hold no samples. Add tars that do, then mome shards index {url}")
    return manifest


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
    if url.startswith("pipe:"):
        raise ConfigError(f"{url}: a pipe: URL runs a command of whoever wrote it. Name the folder of the tars")
    if "{" not in url and not re.search(r"\.(tar|tgz|tar\.\w+)$", url):
        return url, None
    folder, name = split(url)
    if "{" in folder:
        raise DataError(f"{url}: braces may stand in the shards' names only, not in the folder. Name one folder")
    return folder, expand_braces(name)


def _version_of(data: bytes) -> object:
    try:
        return json.loads(data)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _parse_manifest(data: bytes, location: str) -> Manifest:
    try:
        content = json.loads(data)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}, expected {_VERSION}")
        manifest = Manifest(tuple(_parse_record(shard) for shard in content["shards"]))
        if manifest.digest != content["digest"]:
            raise ValueError("its own digest does not fit its shards; it was edited or damaged")
        for shard in manifest.shards:
            if not 0 <= shard.samples * BLOCK <= shard.bytes:
                raise ValueError(f"{shard.name}: {shard.samples} samples in {shard.bytes} bytes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{location}: no manifest of shards ({error}). Make it again: mome shards index") from error
    return manifest


def _parse_record(content: dict[str, Any]) -> ShardRecord:
    """Raises ValueError or TypeError for what describes no shard of the folder: anyone may have written a manifest."""
    record = ShardRecord(**content)
    if not all(isinstance(text, str) for text in (record.name, record.digest, record.etag or "")):
        raise TypeError(f"names and digests are texts, not {record.name!r:.80}")
    record.name.encode()
    if "/" in record.name or "\0" in record.name or record.name in ("", ".", ".."):
        raise ValueError(f"{record.name!r:.80} is no name of a file of the folder")
    if type(record.samples) is not int or type(record.bytes) is not int or record.bytes >= 2**63:
        raise TypeError(f"{record.name}: samples and bytes are no sizes: {record.samples!r:.40}, {record.bytes!r:.40}")
    return record


_WORDS = {"v1.0": 3, "v1.1": 3, "v1.2": 4}  # of one member in DALI's lines


def trusted_count(storage: Storage, folder: str, tar: str, size: int, names: Collection[str]) -> int | None:
    """The samples of a tar of `size` bytes by the first such file among the folder's `names`; None without one.

    Raises DataError, with the file's name, when it does not fit the tar.
    """
    stem = tar.removesuffix(".tar")
    readers: dict[str, Callable[[bytes, int], int]] = {
        f"{tar}.idx": energon_count,
        f"{stem}.idx": dali_count,
        f"{stem}_stats.json": img2dataset_count,
    }
    for name, read in readers.items():
        if name not in names:
            continue
        location = join(folder, name)
        try:
            return read(storage.read(location), size)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise DataError(
                f"{location}: it does not fit {tar} ({error}). Delete it or make it again, or run mome shards index "
                "without --trust-counts"
            ) from error
    return None


def energon_count(data: bytes, size: int) -> int:
    """Raises ValueError when the offsets are not those of a tar of `size` bytes."""
    if len(data) < 8 or len(data) % 8:
        raise ValueError(f"{len(data)} bytes are no list of 8-byte offsets")
    offsets = np.frombuffer(data, dtype="<u8").astype(np.int64)
    if (offsets < 0).any() or (offsets % BLOCK).any() or (np.diff(offsets) <= 0).any():
        raise ValueError("its offsets are no growing multiples of 512")
    if offsets[-1] + 2 * BLOCK > size:
        raise ValueError(f"its samples end at byte {offsets[-1]}, the tar with its end blocks at {size}")
    return len(offsets) - 1


def dali_count(data: bytes, size: int) -> int:
    """Raises ValueError when the lines are not those of a tar of `size` bytes."""
    first, *lines = data.decode("utf-8").splitlines()
    version, stated = first.split()
    if version not in _WORDS:
        raise ValueError(f"version {version}; expected {', '.join(_WORDS)}")
    if len(lines) != int(stated):
        raise ValueError(f"it states {stated} samples and lists {len(lines)}")
    for number, line in enumerate(lines, 2):
        _check_line(line.split(), _WORDS[version], number, size)
    return len(lines)


def _check_line(words: list[str], per_member: int, number: int, size: int) -> None:
    if not words or len(words) % per_member:
        raise ValueError(f"line {number} is no list of members")
    for offset, length in zip(words[1::per_member], words[2::per_member], strict=True):
        if int(offset) % BLOCK or int(length) < 0 or int(offset) + int(length) + 2 * BLOCK > size:
            raise ValueError(f"line {number}: no member of {length} bytes can lie at byte {offset} of {size}")


def img2dataset_count(data: bytes, size: int) -> int:
    """Raises ValueError when the statistics cannot be those of a tar of `size` bytes."""
    successes = json.loads(data)["successes"]
    if type(successes) is not int or successes < 0 or (2 * successes + 2) * BLOCK > size:
        raise ValueError(f"{successes!r} samples in a tar of {size} bytes")
    return successes
