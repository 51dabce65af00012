"""Committed folders: files first, then a manifest with their sizes and SHA-256, then COMMIT.json.

Two attempts may write to the same folder. Each file that both would write is created exclusively (`create=True`); an
attempt that finds a name taken writes its own file under another name, which its manifest records. Where one attempt
would commit what the other would remove, SEAL.json decides: the attempt that creates it proceeds, the other stops.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import NotFound, ObjectChanged, ObjectInfo, Storage, join
from pipeline.training.ownership import Ownership, Start

MANIFEST, SEAL, COMMIT = "MANIFEST.json", "SEAL.json", "COMMIT.json"
Record = dict[str, Any]  # {"bytes": size, "sha256": hexadecimal digest}, and "file" if stored under another name

_FOLDER = re.compile(r"step-(\d{8,})\.(?:(\d{4,})-([0-9a-f]{8})-)?([0-9a-f]+)")
NO_START = Start(0, "")  # of folders whose name has no start: they were not written by a run
_CHUNK = 16 * 2**20  # bytes of one request when a file is verified
_READAHEAD = 4  # chunks in flight


def file_record(data: bytes) -> Record:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit(
    storage: Storage,
    url: str,
    files: Mapping[str, Record],
    metadata: Mapping[str, Any],
    ownership: Ownership | None = None,
    other_name: str | None = None,
) -> str | None:
    """Commit the files already written under `url`: write the manifest, then COMMIT.json.

    The manifest gets `other_name` if its name is taken; without it the folder is this attempt's alone, and sealed
    first. Returns the manifest's name, None if another attempt has committed the folder. Raises StorageError if a file
    is lost or a later start has sealed the folder for removal, Superseded if `ownership` is lost.
    """
    manifest = json.dumps({"files": files, **metadata}, indent=1).encode()
    record = file_record(manifest)
    if other_name is None:
        storage.write(join(url, MANIFEST), manifest)
    elif not storage.write(join(url, MANIFEST), manifest, create=True):
        record["file"] = other_name
        storage.write(join(url, other_name), manifest)
    if missing := describe_missing(storage, url, {**files, MANIFEST: record}):
        raise StorageError(f"{url}: not committed: {missing}. Another attempt on this run may have removed it")
    if ownership is not None:
        ownership.check()
        if other_name is None and not seal(storage, url, f"committed by {ownership.start}"):
            ownership.check()
            raise StorageError(f"{url}: not committed: another attempt on this run is removing it")
    data = json.dumps({"manifest": record}).encode()
    is_ours = storage.write(join(url, COMMIT), data, create=True) or storage.read(join(url, COMMIT)) == data
    return record.get("file", MANIFEST) if is_ours else None


def seal(storage: Storage, url: str, decision: str) -> bool:
    """Seal a folder; return whether `decision`, unique to this attempt, is the one in effect."""
    data = json.dumps({"sealed": decision}).encode()
    return storage.write(join(url, SEAL), data, create=True) or storage.read(join(url, SEAL)) == data


def describe_missing(storage: Storage, url: str, files: Mapping[str, Record]) -> str:
    """Describe the first of a folder's files that a listing lacks or has with another size; "" if there is none."""
    listing = storage.list_info(url)
    for name, record in files.items():
        name = record.get("file", name)
        if name not in listing:
            return f"{name} is missing"
        if listing[name].size != record["bytes"]:
            return f"{name} has {listing[name].size} bytes; {record['bytes']} were written"
    return ""


def is_committed(storage: Storage, url: str) -> bool:
    return storage.exists(join(url, COMMIT))


def read_manifest(storage: Storage, url: str) -> dict[str, Any]:
    """Return a committed folder's manifest, verified. Raises CheckpointError if there is none or it is damaged."""
    try:
        data = storage.read(join(url, COMMIT))
    except NotFound as error:
        raise CheckpointError(f"{url}: not committed (no {COMMIT}); it was never completed") from error
    try:
        record = json.loads(data)["manifest"]
        own_name = {"file": str(record["file"])} if "file" in record else {}
        record = {"bytes": int(record["bytes"]), "sha256": str(record["sha256"]), **own_name}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{url}: {COMMIT} is damaged: it cannot be parsed") from error
    if data != json.dumps({"manifest": record}).encode():
        raise CheckpointError(f"{url}: {COMMIT} is damaged: it differs from what was written")
    data = read_verified(storage, url, MANIFEST, record)
    try:
        manifest: dict[str, Any] = json.loads(data)
        records = {name: (int(record["bytes"]), str(record["sha256"])) for name, record in manifest["files"].items()}
        names = {*records, *(str(record.get("file", name)) for name, record in manifest["files"].items())}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{url}: {MANIFEST} is damaged: {type(error).__name__}: {error}") from error
    for name in names:
        if name in ("", ".", "..") or not {"/", "\\"}.isdisjoint(name):
            raise CheckpointError(f"{url}: {MANIFEST} lists {name!r:.80}, which is not a file name of this folder")
    return manifest


def verify(storage: Storage, url: str, name: str, record: Record) -> ObjectInfo:
    """Return the version of a committed file, verified in parts. Raises CheckpointError if missing or damaged."""
    name = record.get("file", name)
    digest, pending = hashlib.sha256(), deque[Future[bytes]]()
    try:
        info = storage.info(join(url, name))
        if info.size == record["bytes"]:
            with ThreadPoolExecutor(_READAHEAD, "verify") as pool:
                for start in range(0, info.size, _CHUNK):
                    stop = min(start + _CHUNK, info.size)
                    pending.append(pool.submit(storage.read, join(url, name), start, stop, info.etag))
                    while len(pending) > (_READAHEAD if stop < info.size else 0):
                        digest.update(pending.popleft().result())
    except NotFound as error:
        raise CheckpointError(f"{url}: {name} is missing") from error
    except ObjectChanged as error:
        raise CheckpointError(f"{url}: {name} changed while it was read") from error
    _compare(url, name, record, {"bytes": info.size, "sha256": digest.hexdigest()})
    return info


def read_verified(storage: Storage, url: str, name: str, record: Record) -> bytes:
    """Return the content of a committed file. Raises CheckpointError if it is missing or damaged."""
    name = record.get("file", name)
    try:
        data = storage.read(join(url, name))
    except NotFound as error:
        raise CheckpointError(f"{url}: {name} is missing") from error
    _compare(url, name, record, file_record(data))
    return data


def _compare(url: str, name: str, record: Record, actual: Record) -> None:
    """Raise CheckpointError unless a file has the recorded size and digest; the digest counts for equal sizes only."""
    size, digest = actual["bytes"], f" of {actual['sha256'][:12]}…" if actual["bytes"] == record["bytes"] else ""
    if (size, actual["sha256"]) != (record["bytes"], record["sha256"]):
        expected = f"{record['bytes']} bytes of SHA-256 {record['sha256'][:12]}…"
        raise CheckpointError(f"{url}: {name} is damaged: expected {expected}, found {size} bytes{digest}")


# ---- checkpoints among committed folders


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint by its manifest: the progress of the run and what its state was made from."""

    url: str
    step: int  # global steps done
    stage: str = ""
    stage_step: int = 0  # steps done in the stage
    plan_digest: str = ""
    data_counts: dict[str, float] = field(default_factory=dict)  # of the stage so far, by metric
    time_account: dict[str, float] = field(default_factory=dict)  # seconds of the run so far, by phase
    spikes: dict[str, Any] = field(default_factory=dict)  # state of the SpikeGuard
    metrics: dict[str, float] = field(default_factory=dict)  # that it was saved with
    is_complete: bool = True  # as far as the manifest and the files' sizes show

    @classmethod
    def of(cls, url: str, metadata: Mapping[str, Any]) -> Checkpoint:
        names = {field.name for field in fields(cls)} & metadata.keys()
        return cls(**{name: metadata[name] for name in names} | {"url": url})


def parse_name(name: str) -> tuple[int, Start, int] | None:
    """Return (global step, start, time) of a checkpoint folder's name, in which order they sort; None for others."""
    match = _FOLDER.fullmatch(name)
    return match and (int(match[1]), Start(int(match[2] or 0), match[3] or ""), int(match[4], 16))


def newest_first(storage: Storage, url: str) -> dict[str, tuple[int, Start, int]]:
    """Return the URLs of the checkpoints in `url`, committed or not, with their step, start and time; latest first."""
    names = (name.rstrip("/") for name in storage.list(url))
    keys = sorted(((key, name) for name in names if (key := parse_name(name))), reverse=True)
    return {join(url, name): key for key, name in keys}


def select_kept(checkpoints: Iterable[Checkpoint], newest: Checkpoint, config: CheckpointConfig) -> set[str]:
    """Return the URLs to keep: the last `keep`, one every `keep_every` steps, and the best of each stage.

    `newest` replaces others of its step: the state is the same, and an older one may be the damaged checkpoint that the
    run fell back from. An incomplete checkpoint does not count as one of those kept.
    """
    others = [checkpoint for checkpoint in checkpoints if checkpoint.step != newest.step and checkpoint.is_complete]
    ordered = sorted([*others, newest], key=lambda checkpoint: checkpoint.step, reverse=True)
    kept = {newest.url, *(checkpoint.url for checkpoint in ordered[: config.keep])}
    if config.keep_every is not None:
        kept |= {checkpoint.url for checkpoint in ordered if checkpoint.step % config.keep_every == 0}
    if config.keep_best is not None:
        metric, sign = config.keep_best.metric, 1 if config.keep_best.mode == "max" else -1
        measured = [own for own in reversed(ordered) if not math.isnan(own.metrics.get(metric, math.nan))]
        best: dict[str, Checkpoint] = {}  # by stage, the latest of equals
        for own in measured:
            if own.stage not in best or sign * own.metrics[metric] >= sign * best[own.stage].metrics[metric]:
                best[own.stage] = own
        kept |= {own.url for own in best.values()}
    return kept
