"""Time and memory of a stage's steps on this machine, beside what was estimated.

    torchrun --nproc-per-node 8 -m pipeline.training.step_bench configs/vlmo_base.yaml [--stage NAME] [key=value …]

The engine, the step and the model are those of a run; the weights are random and the batch is invented, of full size.
`mome bench step` starts it on the ranks of this machine. Rank 0 prints one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config.errors import MomeError
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.planning.hardware import TERA, accelerator_like
from pipeline.planning.memory import Memory, Work, memory_of
from pipeline.training.collectives import Collectives, share
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.full_batch import full_batch
from pipeline.training.measure import MeasuredEngine, Storages, gradients_of, living, peak_of, states_of
from pipeline.training.micro_batch import with_micro_batch
from pipeline.training.sharding import sharding_of
from pipeline.training.stages import build_stage_model
from pipeline.training.steps import TrainingStep, accumulation
from pipeline.training.workload import work_of

WARM_STEPS = 2
Numbers = dict[str, int]


@dataclass(frozen=True)
class StepBench:
    """What one rank found; times are of all ranks together, bytes of the rank that held most."""

    pairs_per_second: float
    step_seconds: float
    tflops: float  # of one rank
    mfu: float  # of what the accelerator's sheet promises, or, on a CPU, of what a large product reaches
    peak_memory_bytes: int
    measured: Numbers
    predicted: Numbers

    def as_json(self) -> dict[str, Any]:
        ratio = {name: round(self.predicted[name] / self.measured[name], 4) for name in self.measured}
        return {**vars(self), "predicted_to_measured": ratio}


def bench_step(config: RunConfig, index: int, collectives: Collectives, steps: int = 5) -> StepBench:
    """Steps of stage `index` on this rank. All ranks call it together.

    Memory is measured in a step of its own, which with `steps` 0 is the only one, and the one that is timed.
    """
    torch.set_num_threads(config.engine.threads)
    config = config.for_stage(config.stages[index])
    device, vocabulary = collectives.device, config.tokenizer.size
    config = with_micro_batch(config, index, collectives, vocabulary)
    stage = config.stages[index]
    random = stage.model_copy(update={"start_from": "random"})
    config = config.model_copy(update={"stages": (*config.stages[:index], random, *config.stages[index + 1 :])})
    before = living(device)
    model = build_stage_model(config, index, Storage(), vocabulary)
    engine = DeepSpeedEngine(model, config, stage, collectives)
    measured_engine = MeasuredEngine(engine)
    step = TrainingStep(measured_engine, config, stage, collectives)
    rows = slice(*share(stage.global_batch_size, collectives.rank, collectives.world_size))
    batch = full_batch(config, stage, stage.global_batch_size, vocabulary).rows(rows)

    def run() -> None:
        step(batch)
        engine.step(stage.optimizer.lr)

    measured: Numbers = {}
    seconds = _seconds_a_step(run, WARM_STEPS, steps, collectives) if steps else 0.0
    held = sum(_without(living(device), before).values()) - _bytes(batch)
    started = time.perf_counter()
    peak = held + peak_of(lambda: measured.update(_categories(engine, measured_engine, run)), device)
    seconds = seconds or time.perf_counter() - started
    work = work_of(config, index, vocabulary, "cuda" if device.type == "cuda" else "cpu")
    own = rows.stop - rows.start
    memory = predicted_memory(config, index, work, collectives.world_size, own, device.type == "cuda")
    flops = work.step_flops(own, step.accumulation)
    engine.close()
    most = collectives.largest([peak, *measured.values()])
    names = list(measured)
    tflops = flops / seconds / TERA
    return StepBench(
        pairs_per_second=stage.global_batch_size / seconds,
        step_seconds=seconds,
        tflops=tflops,
        mfu=tflops * TERA / _reachable(device),
        peak_memory_bytes=most[0],
        measured=dict(zip(names, most[1:], strict=True)) | {"total": most[0]},
        predicted={name: memory.as_json()[name] for name in [*names, "total"]},
    )


def predicted_memory(config: RunConfig, index: int, work: Work, world_size: int, own: int, on_cuda: bool) -> Memory:
    """The estimate for a rank that reads `own` rows of the batch in its micro-batches."""
    stage = config.stages[index]
    sharding = sharding_of(config, stage, world_size, on_cuda)
    pieces = accumulation(stage.global_batch_size, world_size, config.engine.micro_batch_size)
    rows = -(-own // pieces)
    return memory_of(
        work.parameters,
        sharding,
        work.activations.at(rows),
        work.workspace.at(rows),
        work.batch_bytes_per_example * own,
    )


def _seconds_a_step(run: Callable[[], None], warm: int, steps: int, collectives: Collectives) -> float:
    for _ in range(warm):
        run()
    collectives.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        run()
    if collectives.device.type == "cuda":
        torch.cuda.synchronize(collectives.device)
    collectives.barrier()
    return (time.perf_counter() - started) / steps


def _categories(engine: DeepSpeedEngine, measured: MeasuredEngine, run: Callable[[], None]) -> Numbers:
    """Bytes of the categories, by one more step."""
    gradients: Storages = {}
    measured.after_backward = lambda: gradients.update(gradients_of(engine))
    with measured.saving():
        run()
    measured.after_backward = None
    found = {"states": states_of(engine), "gradients": gradients}
    return {name: sum(held.values()) for name, held in found.items()} | {"activations": measured.saved_bytes}


def _without(storages: Storages, others: Storages) -> Storages:
    return {address: size for address, size in storages.items() if address not in others}


def _bytes(batch: Batch) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor))


def _reachable(device: torch.device) -> float:
    """Floating-point operations a second that a share of is told: the sheet's, or a measured large product's."""
    if device.type == "cuda" and (known := accelerator_like(torch.cuda.get_device_name(device))):
        return known.flops
    size = 2048 if device.type == "cpu" else 8192
    one = torch.randn(size, size, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m pipeline.training.step_bench", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--stage", help="the stage; the last, if not given")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps that are timed; 0: only the one measured for memory"
    )
    given = parser.parse_intermixed_args(arguments)
    collectives = None
    try:
        config = load_config(given.config, given.overrides)
        stage = config.stage_named(given.stage)
        collectives = Collectives()
        found = bench_step(config, config.stages.index(stage), collectives, given.steps)
        if collectives.rank == 0:
            measured = {"stage": stage.name, "world_size": collectives.world_size, **found.as_json()}
            print(json.dumps(measured), flush=True)
    except MomeError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        if collectives is not None:
            collectives.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
