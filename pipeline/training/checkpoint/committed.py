"""Folders that exist only when whole: their files first, then a manifest of sizes and SHA-256, COMMIT.json last.

Two attempts may come upon one folder. Each file of a folder that both would write is created once (`Storage.create`):
an attempt that finds a name taken gives its own file another, which the manifest tells. Where one attempt would commit
what the other would clear away, SEAL.json decides: whoever creates it goes on, and the other leaves the folder alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.config.errors import CheckpointError, StorageError
from pipeline.data.storage import NotFound, ObjectChanged, ObjectInfo, Storage, join

MANIFEST, SEAL, COMMIT = "MANIFEST.json", "SEAL.json", "COMMIT.json"
Record = dict[str, Any]  # {"bytes": size, "sha256": hexadecimal digest}, and "file" where its name is another

_PIECE = 16 * 2**20  # bytes asked for at a time when a file is verified
_AHEAD = 4  # such pieces in flight


def file_record(data: bytes) -> Record:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit(
    storage: Storage,
    url: str,
    files: Mapping[str, Record],
    metadata: Mapping[str, Any],
    before: Callable[[], None] = lambda: None,
    other_name: Callable[[str], str] | None = None,
) -> bool:
    """Declare the files already written under `url` to be a whole: the manifest, then COMMIT.json, last.

    `before` is called when everything but COMMIT.json is there. `other_name` gives files another name where theirs is
    taken; without it the folder is this attempt's own. Returns False when another attempt has committed the folder.
    Raises StorageError when the files are not there as they were written.
    """
    manifest = json.dumps({"files": files, **metadata}, indent=1).encode()
    record = file_record(manifest)
    if other_name is None:
        storage.write(join(url, MANIFEST), manifest)
    elif not storage.create(join(url, MANIFEST), manifest):
        record["file"] = other_name(MANIFEST)
        storage.write(join(url, record["file"]), manifest)
    if fault := what_is_missing(storage, url, {**files, MANIFEST: record}):
        raise StorageError(f"{url}: not committed: {fault}. Another attempt on this run may have removed it")
    before()
    data = _commit_file(record)
    return storage.create(join(url, COMMIT), data) or storage.read(join(url, COMMIT)) == data


def seal(storage: Storage, url: str, words: str) -> bool:
    """Whether this attempt, and no other, decides what becomes of a folder; `words` tell it from others."""
    data = json.dumps({"sealed": words}).encode()
    return storage.create(join(url, SEAL), data) or storage.read(join(url, SEAL)) == data


def what_is_missing(storage: Storage, url: str, files: Mapping[str, Record]) -> str:
    """What one listing tells to be missing of a folder's files; empty when all are there with their sizes."""
    listing = storage.list_info(url)
    for name, record in files.items():
        name = record.get("file", name)
        if name not in listing:
            return f"{name} is missing"
        if listing[name].size != record["bytes"]:
            return f"{name} has {listing[name].size} bytes, and {record['bytes']} were written"
    return ""


def is_committed(storage: Storage, url: str) -> bool:
    return storage.exists(join(url, COMMIT))


def read_manifest(storage: Storage, url: str) -> dict[str, Any]:
    """The manifest of a committed folder, itself verified; its files are not.

    Raises CheckpointError for a folder that is not committed, or whose COMMIT.json or manifest is damaged.
    """
    try:
        data = storage.read(join(url, COMMIT))
    except NotFound as error:
        raise CheckpointError(f"{url}: not committed (no {COMMIT}); it was never finished") from error
    try:
        record = json.loads(data)["manifest"]
        own_name = {"file": str(record["file"])} if "file" in record else {}
        record = {"bytes": int(record["bytes"]), "sha256": str(record["sha256"]), **own_name}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{url}: {COMMIT} is damaged: it cannot be read") from error
    if data != _commit_file(record):
        raise CheckpointError(f"{url}: {COMMIT} is damaged: it is not what was written")
    return _parsed_manifest(url, _verified(storage, url, MANIFEST, record))


def _parsed_manifest(url: str, data: bytes) -> dict[str, Any]:
    """The manifest, if it lists files of its own folder. What else it says is for its readers to judge."""
    try:
        manifest: dict[str, Any] = json.loads(data)
        records = {name: (int(record["bytes"]), str(record["sha256"])) for name, record in manifest["files"].items()}
        names = {*records, *(str(record.get("file", name)) for name, record in manifest["files"].items())}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{url}: {MANIFEST} is damaged: {type(error).__name__}: {error}") from error
    for name in names:
        if name in ("", ".", "..") or not {"/", "\\"}.isdisjoint(name):
            raise CheckpointError(f"{url}: {MANIFEST} lists {name!r:.80}, which is no file of this folder")
    return manifest


def read_committed(storage: Storage, url: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and every file of a committed folder, each verified.

    Raises CheckpointError saying which file is missing or damaged.
    """
    manifest = read_manifest(storage, url)
    return manifest, {name: _verified(storage, url, name, record) for name, record in manifest["files"].items()}


def verify(storage: Storage, url: str, name: str, record: Record) -> ObjectInfo:
    """Reads a file of a committed folder through, keeping none of it; the version that was found to be right.

    Raises CheckpointError when it is missing or damaged.
    """
    name = record.get("file", name)
    try:
        info = storage.info(join(url, name))
        if info.size != record["bytes"]:
            raise _damaged(url, name, record, f"{info.size} bytes")
        digest = hashlib.sha256()
        for piece in _pieces(storage, join(url, name), info):
            digest.update(piece)
    except NotFound as error:
        raise CheckpointError(f"{url}: {name} is missing") from error
    except ObjectChanged as error:
        raise CheckpointError(f"{url}: {name} changed while it was read") from error
    if digest.hexdigest() != record["sha256"]:
        raise _damaged(url, name, record, f"{info.size} bytes of {digest.hexdigest()[:12]}…")
    return info


def _pieces(storage: Storage, url: str, info: ObjectInfo) -> Iterator[bytes]:
    """The file in order, the next pieces being fetched meanwhile."""
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(_AHEAD, "verify") as pool:
        for start in range(0, info.size, _PIECE):
            waiting.append(pool.submit(storage.read_range, url, start, min(start + _PIECE, info.size), info.etag))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _verified(storage: Storage, url: str, name: str, record: Record) -> bytes:
    name = record.get("file", name)
    try:
        data = storage.read(join(url, name))
    except NotFound as error:
        raise CheckpointError(f"{url}: {name} is missing") from error
    found = file_record(data)
    if (found["bytes"], found["sha256"]) != (record["bytes"], record["sha256"]):
        raise _damaged(url, name, record, f"{len(data)} bytes of {found['sha256'][:12]}…")
    return data


def _damaged(url: str, name: str, record: Record, found: str) -> CheckpointError:
    expected = f"{record['bytes']} bytes of SHA-256 {record['sha256'][:12]}…"
    return CheckpointError(f"{url}: {name} is damaged: expected {expected}, found {found}")


def _commit_file(manifest: Record) -> bytes:
    return json.dumps({"manifest": manifest}).encode()
