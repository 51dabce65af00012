"""Batches prepared on other nodes: Ray actors on CPU nodes, for GPU nodes that are short of cores.

They make the rows that their rank's own processes would make, byte for byte: an actor is addressed by the rank it
serves and by the step, and never gives work to whoever asks first. What it costs is the network, which then carries
decoded pixels (150 kB a picture at 224) in place of the JPEG's 30 to 90 kB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from pipeline.config.errors import MomeError
from pipeline.data.examples.batch_buffer import BatchBuffer
from pipeline.data.examples.builder import ExampleBuilder, LoaderSpec
from pipeline.data.loading.backends import ExampleThreads
from pipeline.data.quarantine import BadRecord
from pipeline.data.storage import Storage

RESTARTS = 3  # of an actor whose node is lost; its unfinished steps are asked for again


class RowActor:
    """Makes one contiguous part of a rank's places, step by step."""

    def __init__(self, task: LoaderSpec, storage: Storage):
        self._task, self._storage = task, storage
        self._opened: tuple[ExampleBuilder, ExampleThreads] | None = None

    def make(self, step: int) -> tuple[np.ndarray, list[BadRecord]]:
        """The part's rows of a step, as the memory of a row buffer."""
        if self._opened is None:  # not when the actor is made: an error there would reach nobody as itself
            maker = ExampleBuilder(self._task, self._storage)
            self._opened = maker, ExampleThreads(maker, self._task.config.data.loader.threads_per_worker)
        maker, threads = self._opened
        buffer = BatchBuffer.allocate(self._task.layout)
        runs = threads.submit(step, self._task.places, buffer, self._task.places.start)
        bad = [record for run in runs for record in run.result()]
        maker.reached(step)
        return buffer.memory, bad


class RayBackend:
    """`cluster.loader_actors` actors for one rank. Raises what they raise."""

    def __init__(self, task: LoaderSpec, storage: Storage):
        cluster = task.config.cluster
        self._task, self._shares = task, task.split(cluster.loader_actors)
        options: dict[str, Any] = {
            "num_cpus": cluster.loader_cpus,
            "resources": {cluster.loader_resource: 0.001} if cluster.loader_resource else None,
            "scheduling_strategy": "SPREAD",  # never inside the ranks' own placement group
            "max_restarts": RESTARTS,
            "max_task_retries": RESTARTS,
        }
        actor: Any = ray.remote(RowActor).options(**options)
        self._actors = [actor.remote(share, storage) for share in self._shares]
        self._pending: dict[int, list[Any]] = {}

    def submit(self, step: int) -> None:
        self._pending[step] = [actor.make.remote(step) for actor in self._actors]

    def result(self, step: int) -> tuple[BatchBuffer, list[BadRecord]]:
        try:
            made = ray.get(self._pending.pop(step))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, MomeError) else error from None
        rows, bad = BatchBuffer.allocate(self._task.layout), []
        for share, (memory, replaced) in zip(self._shares, made, strict=True):
            first = share.places.start - self._task.places.start
            rows.copy_rows(range(first, first + len(share.places)), BatchBuffer(share.layout, memory))
            bad += replaced
        return rows, bad

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
