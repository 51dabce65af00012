"""Loader backend of Ray actors on CPU nodes, for GPU nodes that are short of cores.

Examples are the same, byte for byte; the price is sending pixels (150 kB at 224 px) instead of JPEGs (30 to 90 kB).
"""

from typing import Any

import numpy as np
import ray

from pipeline.config.errors import MomeError
from pipeline.data.batch import BatchBuffer
from pipeline.data.examples.builder import LoaderSpec
from pipeline.data.loading.backends import LoaderBackend, ThreadBackend
from pipeline.data.quarantine import BadRecord
from pipeline.data.storage import Storage

RESTARTS = 3  # of an actor whose node is lost; its unfinished steps are submitted again


class ExampleActor(ThreadBackend):
    """An actor that builds one contiguous part of a rank's places, step by step."""

    def build(self, step: int) -> tuple[np.ndarray, list[BadRecord]]:
        """Return the part's examples of a step, as the memory of a batch buffer, and what was replaced."""
        self.submit(step)
        buffer, bad = self.result(step)
        return buffer.memory, bad


class RayBackend(LoaderBackend):
    """`cluster.loader_actors` actors for one rank. Raises what they raise."""

    def __init__(self, spec: LoaderSpec, storage: Storage):
        cluster = spec.config.cluster
        self._spec, self._parts = spec, spec.split(cluster.loader_actors)
        actor: Any = ray.remote(ExampleActor).options(
            num_cpus=cluster.loader_cpus, max_restarts=RESTARTS, max_task_retries=RESTARTS,
            resources={cluster.loader_resource: 0.001} if cluster.loader_resource else None,
            scheduling_strategy="SPREAD",  # never inside the ranks' own placement group
        )  # fmt: skip
        self._actors = [actor.remote(part, storage) for part in self._parts]
        self._pending: dict[int, list[Any]] = {}

    def submit(self, step: int) -> None:
        self._pending[step] = [actor.build.remote(step) for actor in self._actors]

    def result(self, step: int) -> tuple[BatchBuffer, list[BadRecord]]:
        try:
            results = ray.get(self._pending.pop(step))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, MomeError) else error from None
        buffer, bad = BatchBuffer(self._spec.batch_spec), []
        for part, (memory, replaced) in zip(self._parts, results, strict=True):
            first = part.places.start - self._spec.places.start
            for name, array in BatchBuffer(part.batch_spec, memory).items():
                buffer[name][first : first + len(part.places)] = array
            bad += replaced
        return buffer, bad

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
