"""Which checkpoints stay, and how those that do not are deleted.

Only folders whose names this package gives are looked at, and only files whose names it gives are deleted.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, SEAL
from pipeline.training.ownership import Start

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"step-(\d{8,})\.(?:(\d{4,}-[0-9a-f]{8})-)?([0-9a-f]+)")
_FILE = re.compile(rf"rank-\d{{5,}}\.(safetensors|json)|{'|'.join(map(re.escape, (MANIFEST, SEAL, COMMIT)))}")
NOBODY = Start(0, "")  # of folders that carry no start: written by older versions, or outside a run


@dataclass(frozen=True)
class Known:
    """A committed checkpoint: the global step, the stage, and the metrics that it was saved with."""

    url: str
    step: int
    stage: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_whole: bool = True  # as far as its manifest and the sizes of its files tell

    @classmethod
    def of(cls, url: str, metadata: Mapping[str, Any]) -> Known:
        return cls(url, metadata["step"], metadata["stage"], metadata.get("metrics", {}))


def folder_name(step: int, start: Start | None) -> str:
    """A new name for a checkpoint that `start` writes; of two of one step and start the later is the greater."""
    token = f"{time.time_ns() // 1_000_000:x}"
    return f"step-{step:08d}.{token}" if start is None else f"step-{step:08d}.{start}-{token}"


def start_of(name: str) -> Start:
    """The start that wrote a checkpoint's folder."""
    match = _FOLDER.fullmatch(name)
    return Start.parse(match[2]) if match and match[2] else NOBODY


def step_of(name: str) -> int | None:
    """The global step in a checkpoint folder's name; None for any other name."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def newest_first(storage: Storage, url: str) -> list[str]:
    """URLs of the folder's checkpoints, committed or not: by step, and of one step the latest start's first."""
    names = [name for name in (name.rstrip("/") for name in storage.list(url)) if step_of(name) is not None]
    return [join(url, name) for name in sorted(names, key=_age, reverse=True)]


def _age(name: str) -> tuple[int, Start, int]:
    match = _FOLDER.fullmatch(name)
    assert match is not None
    return int(match[1]), start_of(name), int(match[3], 16)


def wanted(found: Iterable[Known], newest: Known, config: CheckpointConfig) -> set[str]:
    """URLs of the checkpoints that stay: the last `keep`, every `keep_every` steps, and the best of each stage.

    One of the newest's step is what that replaces: the state is the same, and the older may be the damaged one that the
    run has fallen back from. One that is not whole takes no place of one that is.
    """
    others = [each for each in found if each.step != newest.step and each.is_whole]
    ordered = sorted([*others, newest], key=lambda each: each.step, reverse=True)
    chosen = {newest.url, *(each.url for each in ordered[: config.keep])}
    if config.keep_every is not None:
        chosen |= {each.url for each in ordered if each.step % config.keep_every == 0}
    if config.keep_best is not None:
        metric, sign = config.keep_best.metric, 1 if config.keep_best.mode == "max" else -1
        for stage in {each.stage for each in ordered}:
            told = [each for each in ordered if each.stage == stage and metric in each.metrics]
            if told:  # of equals the latest
                chosen.add(max(told, key=lambda each: (sign * each.metrics[metric], each.step)).url)
    return chosen


def remove(storage: Storage, url: str, keep: str | None = None) -> None:
    """Delete a checkpoint's folder: COMMIT.json first, so that no half-deleted one looks whole.

    A file of another name is spared, and with it the folder; so is the file `keep`.
    """
    storage.delete(join(url, COMMIT))
    names = storage.list(url)
    if foreign := [name for name in names if not _FILE.fullmatch(name)]:
        log.warning("%s: left in place, for it holds files that are not a checkpoint's: %s", url, ", ".join(foreign))
    spared = {*foreign, keep} & set(names)
    if spared:
        for name in sorted(set(names) - spared):
            storage.delete(join(url, name))
    else:
        storage.delete(url)
