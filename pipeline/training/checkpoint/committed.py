"""Folders that exist only when whole: their files first, then a manifest of sizes and SHA-256, COMMIT.json last."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.config.errors import CheckpointError
from pipeline.data.storage import NotFound, ObjectChanged, ObjectInfo, Storage, join

MANIFEST, COMMIT = "MANIFEST.json", "COMMIT.json"
Record = dict[str, Any]  # {"bytes": size, "sha256": hexadecimal digest}

_PIECE = 16 * 2**20  # bytes asked for at a time when a file is verified
_AHEAD = 4  # such pieces in flight


def file_record(data: bytes) -> Record:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit(storage: Storage, url: str, files: Mapping[str, Record], metadata: Mapping[str, Any]) -> None:
    """Declare the files already written under `url` to be a whole: the manifest, then COMMIT.json, last."""
    manifest = json.dumps({"files": files, **metadata}, indent=1).encode()
    storage.write(join(url, MANIFEST), manifest)
    storage.write(join(url, COMMIT), _commit_file(file_record(manifest)))


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
        record = {"bytes": int(record["bytes"]), "sha256": str(record["sha256"])}
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{url}: {MANIFEST} is damaged: {type(error).__name__}: {error}") from error
    if outside := next((name for name in records if "/" in name or "\\" in name or name in ("", ".", "..")), None):
        raise CheckpointError(f"{url}: {MANIFEST} lists {outside!r:.80}, which is no file of this folder")
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
    try:
        data = storage.read(join(url, name))
    except NotFound as error:
        raise CheckpointError(f"{url}: {name} is missing") from error
    if (found := file_record(data)) != record:
        raise _damaged(url, name, record, f"{len(data)} bytes of {found['sha256'][:12]}…")
    return data


def _damaged(url: str, name: str, record: Record, found: str) -> CheckpointError:
    expected = f"{record['bytes']} bytes of SHA-256 {record['sha256'][:12]}…"
    return CheckpointError(f"{url}: {name} is damaged: expected {expected}, found {found}")


def _commit_file(manifest: Record) -> bytes:
    return json.dumps({"manifest": manifest}).encode()
