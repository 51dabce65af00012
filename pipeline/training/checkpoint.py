"""Checkpoints that exist only when whole (contract C5), in one format for every world size and ZeRO stage.

    <run>/checkpoints/step-00000150.3f9a/rank-00000.safetensors   named float32 fragments of one rank
                                         MANIFEST.json            size and SHA-256 of each file; step, digests, config
                                         COMMIT.json              written last; without it the folder does not exist
    <run>/stages/0-vision/weights.safetensors, vocab.txt, MANIFEST.json, COMMIT.json   what the next stage starts from
                          answers.json, classes.json   what the heads of fine-tuning choose among, if they were trained

The name ends in a token of the attempt, so that a retry never mixes with the leavings of the attempt before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.choices import ANSWERS, CLASSES, Choices
from pipeline.data.storage import Storage, join
from pipeline.training.collectives import Collectives
from pipeline.training.engine import Fragment

log = logging.getLogger(__name__)

MANIFEST, COMMIT = "MANIFEST.json", "COMMIT.json"
WEIGHTS, VOCABULARY = "weights.safetensors", "vocab.txt"


# ---- committed folders


def file_record(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit(storage: Storage, url: str, files: dict[str, dict[str, Any]], metadata: dict[str, Any]) -> None:
    """Declare the files already written under `url` to be a whole: the manifest, then COMMIT.json, last."""
    manifest = json.dumps({"files": files, **metadata}, indent=1).encode()
    storage.write(join(url, MANIFEST), manifest)
    storage.write(join(url, COMMIT), json.dumps({"manifest": file_record(manifest)}).encode())


def read_committed(storage: Storage, url: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and every file of a committed folder, each verified.

    Raises CheckpointError saying which file is missing or damaged.
    """
    if not storage.exists(join(url, COMMIT)):
        raise CheckpointError(f"{url}: not committed (no {COMMIT}); it was never finished or is being written")
    commit_record = json.loads(storage.read(join(url, COMMIT)))
    manifest_data = _verified(storage, url, MANIFEST, commit_record["manifest"])
    manifest = json.loads(manifest_data)
    return manifest, {name: _verified(storage, url, name, record) for name, record in manifest["files"].items()}


def _verified(storage: Storage, url: str, name: str, record: dict[str, Any]) -> bytes:
    if not storage.exists(join(url, name)):
        raise CheckpointError(f"{url}: {name} is missing")
    data = storage.read(join(url, name))
    if file_record(data) != record:
        raise CheckpointError(
            f"{url}: {name} is damaged: expected {record['bytes']} bytes of SHA-256 {record['sha256'][:12]}…, "
            f"found {len(data)} of {file_record(data)['sha256'][:12]}…"
        )
    return data


# ---- checkpoints of a step


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands: the global step reached, and what the state was made from."""

    url: str
    step: int  # global steps done
    stage: str
    stage_step: int  # steps done in the stage
    plan_digest: str
    world_size: int
    zero_stage: int
    data_counts: dict[str, float]  # of the stage so far, by metric: samples read and found bad


class SavedState:
    """A checkpoint's fragments, read by parameter and range whatever ranks wrote them (a FragmentSource)."""

    def __init__(self, checkpoint: Checkpoint, files: Iterable[bytes]):
        self.optimizer_step = checkpoint.stage_step
        self._url = checkpoint.url
        self._parts: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        for data in files:
            for key, tensor in safetensors.torch.load(data).items():
                name, start, kind = key.rsplit("|", 2)
                self._parts.setdefault((name, kind), []).append((int(start), tensor))
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[0])

    def holds(self, name: str, kind: str) -> bool:
        return (name, kind) in self._parts

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        result = torch.empty(stop - start)
        filled = 0
        for offset, part in self._parts.get((name, kind), []):
            low, high = max(start, offset), min(stop, offset + len(part))
            if low < high:
                result[low - start : high - start] = part[low - offset : high - offset]
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(
                f"{self._url}: holds {filled} of the {stop - start} elements {start}…{stop} of {name} ({kind}); "
                "it was written by another architecture or another frozen set"
            )
        return result


class CheckpointStore:
    """The checkpoints of one run, written and read by all its ranks together."""

    def __init__(self, storage: Storage, folder: str, collectives: Collectives, keep: int):
        self.storage = storage
        self.url = join(folder, "checkpoints")
        self.collectives = collectives
        self.keep = keep

    def save(self, fragments: Iterable[Fragment], metadata: dict[str, Any]) -> str:
        """Write this rank's fragments; rank 0 commits once every rank's file lies there. Returns the URL."""
        token = self.collectives.broadcast_object(secrets.token_hex(2))
        url = join(self.url, f"step-{metadata['step']:08d}.{token}")
        tensors = {
            f"{fragment.name}|{fragment.start}|{kind}": value.contiguous()
            for fragment in fragments
            for kind, value in fragment.values.items()
        }
        name = f"rank-{self.collectives.rank:05d}.safetensors"
        data = safetensors.torch.save(tensors)
        self.storage.write(join(url, name), data)
        records = dict(self.collectives.gather_objects((name, file_record(data))))
        if self.collectives.rank == 0:
            commit(self.storage, url, records, {**metadata, "world_size": self.collectives.world_size})
            self._retire(url)
        self.collectives.barrier()
        return url

    def latest(self) -> tuple[Checkpoint, SavedState] | None:
        """The newest whole checkpoint, verified; a damaged one is told and passed over. The same on every rank."""
        chosen: str | None = None
        if self.collectives.rank == 0:
            chosen = next((url for url in self._newest_first() if self._is_whole(url)), None)
        chosen = self.collectives.broadcast_object(chosen)
        if chosen is None:
            return None
        manifest, files = read_committed(self.storage, chosen)
        names = ("step", "stage", "stage_step", "plan_digest", "world_size", "zero_stage", "data_counts")
        checkpoint = Checkpoint(url=chosen, **{name: manifest[name] for name in names})
        return checkpoint, SavedState(checkpoint, files.values())

    def _newest_first(self) -> list[str]:
        names = [name.rstrip("/") for name in self.storage.list(self.url)]
        return [join(self.url, name) for name in sorted(names, reverse=True) if name.startswith("step-")]

    def _is_whole(self, url: str) -> bool:
        try:
            read_committed(self.storage, url)
        except (CheckpointError, json.JSONDecodeError, KeyError) as error:
            log.warning("checkpoint passed over: %s", error)
            return False
        return True

    def _retire(self, newest: str) -> None:
        """Delete all but the newest `keep`; COMMIT.json goes first, so that no half-deleted one looks whole."""
        committed = [url for url in self._newest_first() if self.storage.exists(join(url, COMMIT))]
        kept = {newest, *committed[: self.keep]}
        for url in committed:
            if url not in kept:
                self.storage.delete(join(url, COMMIT))
                self.storage.delete(url)


# ---- weights of a finished stage


@dataclass(frozen=True)
class Weights:
    """What a stage hands over: weights by name, never optimiser state, and what they are the weights of."""

    url: str
    config: RunConfig
    stage: str
    step: int
    tensors: dict[str, Tensor]
    vocabulary: list[str]
    absent: frozenset[str] = frozenset()  # parts of the model that imported weights were said not to hold
    choices: Mapping[str, Choices] = field(default_factory=dict)  # what heads choose among, by file name


def stage_url(config: RunConfig, index: int) -> str:
    return join(config.folder, "stages", f"{index}-{config.stages[index].name}")


def save_weights(
    storage: Storage,
    url: str,
    tensors: dict[str, Tensor],
    vocabulary: list[str],
    metadata: dict[str, Any],
    choices: Mapping[str, Choices] | None = None,
) -> None:
    """Commit a stage's weights, its vocabulary and what its heads choose among; called on rank 0 alone."""
    files = {
        WEIGHTS: safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}),
        VOCABULARY: "".join(f"{token}\n" for token in vocabulary).encode(),
        **{name: each.to_bytes() for name, each in (choices or {}).items()},
    }
    for name, data in files.items():
        storage.write(join(url, name), data)
    commit(storage, url, {name: file_record(data) for name, data in files.items()}, metadata)


def is_committed(storage: Storage, url: str) -> bool:
    return storage.exists(join(url, COMMIT))


def load_weights(storage: Storage, url: str) -> Weights:
    """Weights of a stage's folder, or of the last finished stage of a run's folder.

    Raises CheckpointError when there is none or it is damaged.
    """
    try:
        names = [name.rstrip("/") for name in storage.list(join(url, "stages"))]
    except StorageError as error:
        raise CheckpointError(f"{url}: cannot be read: {error}") from error
    finished = [name for name in sorted(names, key=_stage_order) if is_committed(storage, join(url, "stages", name))]
    if finished:
        url = join(url, "stages", finished[-1])
    if not is_committed(storage, url):
        raise CheckpointError(f"{url}: no finished stage here; give the folder of a run or of one of its stages")
    manifest, files = read_committed(storage, url)
    return Weights(
        url=url,
        config=RunConfig.model_validate_json(json.dumps(manifest["config"])),
        stage=manifest["stage"],
        step=manifest["step"],
        tensors=safetensors.torch.load(files[WEIGHTS]),
        vocabulary=files[VOCABULARY].decode().splitlines(),
        absent=frozenset(manifest.get("absent", ())),
        choices={
            name: Choices.from_bytes(files[name], join(url, name)) for name in (ANSWERS, CLASSES) if name in files
        },
    )


def _stage_order(name: str) -> tuple[int, str]:
    number = name.partition("-")[0]
    return (int(number) if number.isdigit() else -1, name)
