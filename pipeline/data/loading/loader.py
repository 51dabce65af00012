"""From the plan to batches, in order. What a batch holds is decided by its step alone (contract C1).

Batches are prepared ahead by threads, processes or actors (`pipeline.data.loading.backends`), and handed over in
order. The loader's whole state is the step it delivers next: what was prepared in vain is never counted.

Shapes: B rows, S image side, L tokens, K masked tokens or patches a row.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.config.urls import is_local
from pipeline.data.batch import Batch
from pipeline.data.contents.choices import load_answers
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples.batch_buffer import BatchBuffer
from pipeline.data.examples.builder import LoaderSpec
from pipeline.data.loading.backends import BackendFactory, LoaderBackend, ThreadBackend
from pipeline.data.loading.process_backend import ProcessBackend
from pipeline.data.order import rank_slice
from pipeline.data.quarantine import Quarantine
from pipeline.data.reading.cache import NodeCache, open_window_bytes
from pipeline.data.shards.source import Source, open_source, selection_url
from pipeline.data.storage import Storage


def local_backend(task: LoaderSpec, storage: Storage) -> LoaderBackend:
    """Beside the trainer: processes, or threads of its own process when the config asks for no process."""
    return ProcessBackend(task, storage) if task.config.data.loader.num_workers else ThreadBackend(task, storage)


class Loader:
    """One rank's batches of one stage. Steps count from the stage's start.

    Raises ConfigError, DataError or StorageError when a source cannot be used. Close it, or use it in `with`.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: StageConfig,
        storage: Storage,
        tokenizer: Tokenizer,
        rank: int,
        world_size: int,
        backend: BackendFactory = local_backend,
    ):
        config = config.for_stage(stage)
        self._config, self._stage, self._storage, self._world_size = config, stage, storage, world_size
        sources = {name: _source(config, storage, name) for name in stage.sources}
        self._names, self._sizes = sorted(sources), {name: int(sources[name].counts.sum()) for name in sources}
        _check_cache(config, sources, world_size)
        places = rank_slice(stage.global_batch_size, rank, world_size)
        answers = load_answers(config, stage, storage)
        self._task = LoaderSpec(config, stage, tokenizer, sources, places, answers)
        self.order = self._task.order()
        self._preparer = backend
        self._quarantine = Quarantine(config.data.max_bad_rate)
        self._read_before: dict[str, float] = dict.fromkeys(self._sizes, 0.0)
        self._open: list[LoaderBackend] = []
        self.wait_seconds = 0.0  # that the consumer of `batches` has waited for data

    @property
    def digest(self) -> str:
        """Names the order and content of every batch; a run only resumes with the digest it began with."""
        return self.order.digest

    @property
    def sources(self) -> dict[str, str]:
        """Name -> digest of what the stage reads of it."""
        return {name: source.digest for name, source in self._task.sources.items()}

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, … without end. What went wrong with a batch is raised in its turn."""
        seen = self._quarantine.seen
        epochs = self.order.epochs(start_step)
        self._read_before = {n: epochs[n] / self._world_size - seen[n] / self._sizes[n] for n in epochs}
        backend = self._preparer(self._task, self._storage)
        self._open.append(backend)
        begun: deque[int] = deque()
        step = start_step
        try:
            while backend in self._open:
                while len(begun) <= self._config.data.loader.prefetch_batches:
                    backend.submit(step)
                    begun.append(step)
                    step += 1
                yield self._finish(backend, begun.popleft())
        finally:
            self._end(backend)

    def counts(self) -> dict[str, int | float]:
        """For the tracker: bad samples, samples and epochs of each source; the sums over ranks are the whole run's."""
        counts: dict[str, int | float] = {}
        for name, size in self._sizes.items():
            seen = self._quarantine.seen[name]
            counts[f"bad/{name}"] = self._quarantine.bad[name]
            counts[f"samples/{name}"] = seen
            counts[f"epochs/{name}"] = self._read_before[name] + seen / size
        return counts

    def quarantined(self) -> list[dict[str, str | int]]:
        """The bad samples delivered as replacements since the last call, as records for a JSONL log."""
        return [record.as_json() for record in self._quarantine.drain()]

    def close(self) -> None:
        """Ends every thread and process. Iterators in use end at their next batch."""
        for backend in list(self._open):
            self._end(backend)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self, backend: LoaderBackend) -> None:
        if backend in self._open:
            self._open.remove(backend)
            backend.close()

    def _finish(self, backend: LoaderBackend, step: int) -> Batch:
        started = time.perf_counter()
        try:
            rows, bad = backend.result(step)
        finally:
            self.wait_seconds += time.perf_counter() - started
        self._quarantine.deliver((self._names[number] for number in rows["source"]), bad)
        if step == self._stage.steps - 1:
            self._quarantine.finish()
        return to_batch(step, self._task.places, rows)


def to_batch(step: int, places: range, rows: BatchBuffer) -> Batch:
    """The rows as tensors over the same memory, cut to what the longest among them need."""
    whole = ("label", "answers", "answer_scores")
    tensors: dict[str, Tensor] = {name: torch.from_numpy(rows[name]) for name in whole if name in rows}
    tensors |= _picture_tensors(rows)
    if "text" in rows:
        lengths = rows["text_length"]
        longest = int(lengths.max())
        tensors["text"] = torch.from_numpy(rows["text"][:, :longest])
        tensors["text_keep"] = torch.from_numpy(np.arange(longest) < lengths[:, None])
    if "masked_text" in rows:
        tensors["masked_text"] = torch.from_numpy(rows["masked_text"][:, :longest])
        most = int(rows["num_masked"].max())
        for name in ("mask_positions", "mask_labels"):
            tensors[name] = torch.from_numpy(rows[name][:, :most])
    if "region_features" in rows:
        tensors |= _region_tensors(rows)
    return Batch(
        step=step,
        place=torch.arange(places.start, places.stop),
        uid=torch.from_numpy(rows["uid"]),
        image_id=torch.from_numpy(rows["image_id"]),
        source=torch.from_numpy(rows["source"]),
        **tensors,
    )


def _picture_tensors(rows: BatchBuffer) -> dict[str, Tensor]:
    """Pictures, cut to the tallest and widest if they keep their shape, and their patches, cut to the most of a row."""
    tensors = {}
    for name in ("image", "second_image"):
        if name not in rows:
            continue
        pictures = rows[name]
        if (size := f"{name}_size") in rows:
            height, width = rows[size].max(axis=0)
            pictures, tensors[size] = pictures[:, :height, :width], torch.from_numpy(rows[size])
        tensors[name] = torch.from_numpy(pictures)
    for name, counted in (
        ("visible_patches", "visible_patches"),
        ("patch_positions", "patch_positions"),
        ("patch_replacements", "patch_positions"),
    ):
        if name in rows:
            most = int((rows[counted] >= 0).sum(axis=1).max())
            tensors[name] = torch.from_numpy(rows[name][:, :most])
    return tensors


def _region_tensors(rows: BatchBuffer) -> dict[str, Tensor]:
    """The regions, cut to the most regions and the most masked ones of a row."""
    count = rows["num_regions"]
    most = int(count.max())
    names = ("region_features", "region_location", "region_class", "region_hidden")
    tensors = {name: torch.from_numpy(rows[name][:, :most]) for name in names if name in rows}
    tensors["region_keep"] = torch.from_numpy(np.arange(most) < count[:, None])
    if "region_positions" in rows:
        masked = int((rows["region_positions"] >= 0).sum(axis=1).max())
        tensors["region_positions"] = torch.from_numpy(rows["region_positions"][:, :masked])
    return tensors


def _source(config: RunConfig, storage: Storage, name: str) -> Source:
    if name not in config.sources:
        raise ConfigError(f"stage source '{name}' is not among the run's sources: {', '.join(config.sources)}")
    return open_source(storage, config.sources[name], selection_url(config, name))


def _check_cache(config: RunConfig, sources: dict[str, Source], world_size: int) -> None:
    """Raises ConfigError when this node's cache has less room than its ranks' open windows need."""
    data = config.data
    if data.cache.folder is None:
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks of this node, as torchrun and Ray Train tell them
    streams = min(data.streams, -(-data.streams * local // world_size) + 1)  # the slices' ends fall inside streams
    needed = sum(
        open_window_bytes((shard.bytes for shard in source.manifest.shards), streams, data.shuffle_window)
        for source in sources.values()
        if not is_local(source.url)
    )
    NodeCache(data.cache.folder, data.cache.max_bytes).check_budget(needed, f"the open windows of {streams} streams")
