"""One loader measured in a process of its own: `python -m jobs.bench.contender JOB.json RESULT.json`.

The count begins once the loader is warm and takes in every process it started. All run on one thread per worker.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any

import cv2
import torch

from jobs.bench.cpu import tree_cpu_seconds
from jobs.bench.peers import PEERS, WARM_UP_BATCHES, Stream, Work
from jobs.bench.pillow import PillowRecipe
from pipeline.config.schema import (
    AugmentConfig,
    DataConfig,
    LoaderConfig,
    ObjectiveConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    VLMoConfig,
)
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import Loader
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join

SOURCE = "photos"
KEEPING_UP = 0.6  # of the rate that the loader reaches alone: what the trainer's steps ask for
ENDLESS_STEPS = 10**9


@dataclass(frozen=True)
class Job:
    """What to measure. `workers` processes of `threads` threads for ours; peers get as many processes in all."""

    contender: str
    shards: str  # a local folder with its manifest
    vocabulary: str
    samples: int
    batch: int
    workers: int
    threads: int
    seed: int
    operations: int  # of RandAugment; 0: off
    normalise: bool  # peers: (3, S, S) float32 in [-1, 1] instead of (S, S, 3) uint8

    @property
    def config(self) -> RunConfig:
        """The same work as a run of ours: one vision-language stage over the shards."""
        stage = StageConfig(
            name="bench",
            sources={SOURCE: 1.0},
            objectives={"itc": ObjectiveConfig(), "mlm": ObjectiveConfig()},
            steps=ENDLESS_STEPS,
            global_batch_size=self.batch,
        )
        loading = LoaderConfig(num_workers=self.workers, threads_per_worker=self.threads)
        augment = AugmentConfig(num_ops=self.operations)
        return RunConfig(
            name="bench",
            seed=self.seed,
            model=VLMoConfig(),
            sources={SOURCE: SourceConfig(shards=self.shards)},
            data=DataConfig(streams=gcd(self.batch, 16), augment=augment, loader=loading),
            stages=(stage,),
        )

    @property
    def work(self) -> Work:
        """The same work for a peer."""
        config, shards = self.config, load_manifest(Storage(), self.shards).shards
        stage = config.stages[0]
        recipe = PillowRecipe(
            vocabulary=self.vocabulary,
            size=config.model.image_size,
            crop_scale=config.data.augment.crop_scale,
            operations=self.operations,
            magnitude=config.data.augment.magnitude,
            max_text_length=stage.max_text_length,
            mask_probability=stage.masking.mlm_probability,
            normalise=self.normalise,
        )
        return Work(
            shards=tuple(join(self.shards, shard.name) for shard in shards),
            counts=tuple(shard.samples for shard in shards),
            samples=self.samples,
            batch=self.batch,
            workers=max(1, self.workers) * self.threads,
            seed=self.seed,
            recipe=recipe,
        )


def measure(job: Job) -> dict[str, Any]:
    """Samples, CPU and wall seconds of one contender."""
    if job.contender == "parts":
        from jobs.bench.parts import measure_parts

        return measure_parts(job)
    if job.contender == "wait":
        return _measure_wait(job)
    if job.contender != "mome":
        return _count(PEERS[job.contender](job.work), job.samples)
    with _our_loader(job) as loader:
        batches = ((batch.image, batch.text) for batch in loader.batches(0))
        return _count(Stream.endless(batches), job.samples)


def _count(stream: Stream, samples: int) -> dict[str, Any]:
    for _ in stream.warm_up:
        pass
    before, started, counted = tree_cpu_seconds(os.getpid()), time.perf_counter(), 0
    while counted < samples:
        image, _ = next(stream.batches)
        counted += len(image)
    seconds, spent = time.perf_counter() - started, tree_cpu_seconds(os.getpid()) - before
    output = f"{str(image.dtype).removeprefix('torch.')} {'x'.join(str(side) for side in image.shape[1:])}"
    return {"samples": counted, "seconds": seconds, "cpu": asdict(spent), "output": output}


def _measure_wait(job: Job) -> dict[str, Any]:
    """What a trainer waits whose steps take a fixed time, at a pace that the loader can keep.

    `wait_share` is the loader's own account; `next_share` is the time inside next(), which adds the hand-over.
    """
    batches = -(-job.samples // job.batch)
    with _our_loader(job) as loader:
        stream = loader.batches(0)
        _skip(stream, WARM_UP_BATCHES)
        started = time.perf_counter()
        _skip(stream, batches)
        step = (time.perf_counter() - started) / batches / KEEPING_UP
        time.sleep(step)  # the trainer begins with its queue full, as after its own start
        waited, started, inside = loader.wait_seconds, time.perf_counter(), 0.0
        for _ in range(batches):
            asked = time.perf_counter()
            next(stream)
            inside += time.perf_counter() - asked
            time.sleep(step)
        elapsed = time.perf_counter() - started
        return {
            "wait_share": (loader.wait_seconds - waited) / elapsed,
            "next_share": inside / elapsed,
            "step_seconds": step,
            "free_rate": job.batch / (step * KEEPING_UP),
        }


def _skip(stream: Iterator[Any], batches: int) -> None:
    for _ in itertools.islice(stream, batches):
        pass


def _our_loader(job: Job) -> Loader:
    config, storage = job.config, Storage()
    return Loader(config, config.stages[0], storage, Tokenizer.load(storage, job.vocabulary), 0, 1)


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    random.seed(job.seed)
    Path(sys.argv[2]).write_text(json.dumps(measure(job)))


if __name__ == "__main__":
    main()
