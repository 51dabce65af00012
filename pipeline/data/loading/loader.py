"""One rank's batches of a stage, in order, and the fingerprint that proves what they contain. A batch is determined by
its step alone (contract C1), so that the loader's whole state is the next step: batches prepared ahead and not used do
not count.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.config.urls import is_local
from pipeline.data.batch import Batch
from pipeline.data.contents.choices import ANSWERS, choices_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples.builder import LoaderSpec
from pipeline.data.loading.backends import BackendFactory, LoaderBackend, ProcessBackend, ThreadBackend
from pipeline.data.order import share
from pipeline.data.quarantine import Quarantine
from pipeline.data.shards.source import open_source
from pipeline.data.storage import Storage


class Loader:
    """One rank's batches of a stage. Raises ConfigError, DataError or StorageError; close it after use."""

    def __init__(
        self, config: RunConfig, stage: StageConfig, groups: frozenset[str], storage: Storage, tokenizer: Tokenizer,
        rank: int, world_size: int, backend: BackendFactory | None = None,
    ):  # fmt: skip
        config = config.for_stage(stage)
        self._config, self._stage, self._storage, self._world_size = config, stage, storage, world_size
        if unknown := stage.sources.keys() - config.sources.keys():
            raise ConfigError(f"stage source '{min(unknown)}' is not among the run's: {', '.join(config.sources)}")
        sources = {n: open_source(storage, config.sources[n], config.folder) for n in stage.sources}
        self._names, self._sizes = sorted(sources), {name: int(sources[name].counts.sum()) for name in sources}
        data = config.data
        if data.cache.folder is not None:  # it must hold the open shuffle windows of this node's ranks
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and by Ray Train
            streams = min(data.streams, -(-data.streams * local_ranks // world_size) + 1)  # slices end inside streams
            remote = [source.manifest.shards for source in sources.values() if not is_local(source.url)]
            sizes = [sorted((shard.bytes for shard in shards), reverse=True) for shards in remote]
            needed = sum(sum(largest_first[: streams * data.shuffle_window]) for largest_first in sizes)
            if needed > data.cache.max_bytes:
                raise ConfigError(
                    f"data.cache.max_bytes {data.cache.max_bytes} is below the {needed} bytes of the open windows of "
                    f"{streams} streams: shards would be deleted while they are read. Raise it to at least {needed}, "
                    "lower data.shuffle_window or data.streams, or unset data.cache.folder"
                )
        places = range(*share(stage.global_batch_size, rank, world_size))
        answers = choices_of(config, [stage], storage).get(ANSWERS)
        self._spec = LoaderSpec(config, stage, tokenizer, sources, places, groups, answers)
        self.order = self._spec.order()
        self.digest = self.order.digest  # of the order and content of every batch; a run resumes only with the same
        self.sources = {name: source.digest for name, source in sources.items()}  # digests of what the stage reads
        self._backend: BackendFactory = backend or (ProcessBackend if data.loader.num_workers else ThreadBackend)
        self._quarantine = Quarantine(data.max_bad_rate)
        self._epochs_before: dict[str, float] = dict.fromkeys(self._sizes, 0.0)
        self._open: list[LoaderBackend] = []
        self.wait_seconds = 0.0  # time that the consumer of `batches` has waited for data

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield the batches of start_step, start_step + 1, … without end. A batch's error is raised in its turn."""
        cycles = start_step * self.order.batch_size / sum(self.order.parts)  # of the mixing, in all ranks
        for name, part in zip(self.order.names, self.order.parts, strict=True):
            size, counted = self._sizes[name], self._quarantine.seen[name]
            self._epochs_before[name] = cycles * part / size / self._world_size - counted / size
        backend = self._backend(self._spec, self._storage)
        self._open.append(backend)
        submitted, next_step = deque[int](), start_step
        try:
            while backend in self._open:
                while len(submitted) <= self._config.data.loader.prefetch_batches:
                    backend.submit(next_step)
                    submitted.append(next_step)
                    next_step += 1
                step, started = submitted.popleft(), time.perf_counter()
                try:
                    buffer, bad = backend.result(step)
                finally:
                    self.wait_seconds += time.perf_counter() - started
                names = [self._names[number] for number in buffer["source"]]
                self._quarantine.deliver(names, bad, is_last=step == self._stage.steps - 1)
                yield buffer.to_batch(step, self._spec.places)
        finally:
            if backend in self._open:
                self._open.remove(backend)
                backend.close()

    def counts(self) -> dict[str, int | float]:
        """Return bad samples, samples and epochs of each source; summed over ranks they are the whole run's."""
        counts: dict[str, int | float] = {}
        for name, size in self._sizes.items():
            samples = self._quarantine.seen[name]
            counts |= {f"bad/{name}": self._quarantine.bad[name], f"samples/{name}": samples}
            counts[f"epochs/{name}"] = self._epochs_before[name] + samples / size
        return counts

    def quarantined(self) -> list[dict[str, str | int]]:
        """Return the records of bad samples replaced since the last call, for a JSONL log."""
        records, self._quarantine.new = self._quarantine.new, []
        return [asdict(record) for record in records]

    def close(self) -> None:
        """Stop every thread and process. Iterators in use end at their next batch."""
        while self._open:
            self._open.pop().close()


def fingerprint(
    config: RunConfig, stage: StageConfig, groups: frozenset[str], storage: Storage, tokenizer: Tokenizer,
    steps: range, world_size: int = 1,
) -> str:  # fmt: skip
    """Return the SHA-256 (hex) of global batches of a stage without padding, equal for every `world_size`."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        loaders = [Loader(config, stage, groups, storage, tokenizer, rank, world_size) for rank in range(world_size)]
        streams = [stack.enter_context(closing(loader)).batches(steps.start) for loader in loaders]
        for _ in steps:
            for stream in streams:
                next(stream).hash_into(digest)
    return digest.hexdigest()
