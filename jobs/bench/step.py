"""`mome bench step`: time and memory of a stage's training steps, next to the estimate of `mome plan`.

    torchrun --nproc-per-node 8 -m jobs.bench.step configs/vlmo_base.yaml [--stage NAME] [key=value …]

Engine, step and model are those of a run; the weights are random and the batch is synthetic, of maximum size.
`mome bench step` starts the ranks on this machine. Rank 0 prints one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.load import load_config
from pipeline.data.storage import Storage
from pipeline.planning.hardware import TERA, accelerator_like
from pipeline.planning.memory import memory_of
from pipeline.training.collectives import Collectives, share
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.deepspeed_setup import sharding_of
from pipeline.training.full_batch import full_batch
from pipeline.training.measure import MeasuredEngine, Storages, gradients_of, living, peak_of, states_of
from pipeline.training.stages import Stage, build_stage_model
from pipeline.training.step import TrainingStep
from pipeline.training.workload import with_micro_batch, work_of

WARM_STEPS = 2
Numbers = dict[str, int]


@dataclass(frozen=True)
class StepBench:
    """Measurement of one stage: times of all ranks together, bytes of the rank with the largest allocation."""

    pairs_per_second: float
    step_seconds: float
    tflops: float  # per rank
    mfu: float  # fraction of the data sheet's peak, or on a CPU of the speed of a large matrix product
    peak_memory_bytes: int
    measured: Numbers
    predicted: Numbers

    def as_json(self) -> dict[str, Any]:
        ratio = {name: round(self.predicted[name] / self.measured[name], 4) for name in self.measured}
        return {**vars(self), "predicted_to_measured": ratio}


def run_step_bench(config: Path, overrides: list[str], stage: str | None, ranks: int, steps: int) -> dict[str, Any]:
    """Measure on `ranks` ranks of this machine, started by torchrun, and return rank 0's result.

    Raises ConfigError before anything is started, RunFailed with the ranks' messages when they fail.
    """
    load_config(config, overrides)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "jobs.bench.step", str(config), f"--steps={steps}", *overrides]
    if stage is not None:
        command.append(f"--stage={stage}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not results:
        errors = [line for line in done.stderr.splitlines() if line.startswith("rank ") or "Error" in line]
        raise RunFailed("bench step: " + ("\n".join(errors[:5]) or done.stderr[-2000:]))
    result: dict[str, Any] = json.loads(results[-1])
    return result


def bench_step(stage: Stage, collectives: Collectives, steps: int = 5) -> StepBench:
    """Measure steps of a stage; all ranks must call it together.

    Memory is measured in a separate step; with `steps` 0 it is the only step, and also the timed one.
    """
    torch.set_num_threads(stage.run.engine.threads)
    device, vocabulary = collectives.device, stage.run.tokenizer.size
    stages = [config.model_copy(update={"start_from": "random"}) for config in stage.run.stages]
    stage = Stage(stage.run.model_copy(update={"stages": tuple(stages)}), stage.index)
    stage = with_micro_batch(stage, collectives, vocabulary)
    batch_size = stage.config.global_batch_size
    before = living(device)
    model = build_stage_model(stage, Storage(), vocabulary)
    engine = DeepSpeedEngine(model, stage, collectives)
    measured_engine = MeasuredEngine(engine)
    step = TrainingStep(measured_engine, stage, collectives)
    rows = slice(*share(batch_size, collectives.rank, collectives.world_size))
    batch = full_batch(stage.run, stage.config, batch_size, vocabulary).rows(rows)

    def run() -> None:
        step(batch)
        engine.step(stage.config.optimizer.lr)

    measured: Numbers = {}
    seconds = _seconds_a_step(run, WARM_STEPS, steps, collectives) if steps else 0.0
    members = [member for member in vars(batch).values() if isinstance(member, torch.Tensor)]
    batch_bytes = sum(member.untyped_storage().nbytes() for member in members)
    held = sum(_without(living(device), before).values()) - batch_bytes
    started = time.perf_counter()
    peak = held + peak_of(lambda: measured.update(_categories(engine, measured_engine, run)), device)
    seconds = seconds or time.perf_counter() - started
    work = work_of(stage, vocabulary, "cuda" if device.type == "cuda" else "cpu")
    own = rows.stop - rows.start
    examples = -(-own // step.accumulation)
    memory = memory_of(
        work.parameters,
        sharding_of(stage, collectives.world_size, device.type == "cuda"),
        work.activations.at(examples),
        work.workspace.at(examples),
        work.batch_bytes_per_example * own,
    )
    flops = work.step_flops(own, step.accumulation)
    engine.close()
    peaks = collectives.largest([peak, *measured.values()])
    names = list(measured)
    tflops = flops / seconds / TERA
    return StepBench(
        pairs_per_second=batch_size / seconds,
        step_seconds=seconds,
        tflops=tflops,
        mfu=tflops * TERA / _reachable(device),
        peak_memory_bytes=peaks[0],
        measured=dict(zip(names, peaks[1:], strict=True)) | {"total": peaks[0]},
        predicted={name: memory.as_json()[name] for name in [*names, "total"]},
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
    """Run one more step and return the bytes of each category."""
    gradients: Storages = {}
    measured.after_backward = lambda: gradients.update(gradients_of(engine))
    with measured.saving():
        run()
    measured.after_backward = None
    allocations = {"states": states_of(engine), "gradients": gradients}
    return {name: sum(held.values()) for name, held in allocations.items()} | {"activations": measured.saved_bytes}


def _without(storages: Storages, others: Storages) -> Storages:
    return {address: size for address, size in storages.items() if address not in others}


def _reachable(device: torch.device) -> float:
    """Return the peak FLOP/s that MFU refers to: the data sheet's, or the measured speed of a large matrix product."""
    if device.type == "cuda" and (known := accelerator_like(torch.cuda.get_device_name(device))):
        return known.flops
    size = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m jobs.bench.step", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--stage", help="name of the stage (default: the last one)")
    parser.add_argument(
        "--steps", type=int, default=5, help="number of timed steps; 0 runs only the step that measures memory"
    )
    options = parser.parse_intermixed_args(arguments)
    collectives = None
    try:
        config = load_config(options.config, options.overrides)
        stage = config.stage_named(options.stage)
        collectives = Collectives()
        result = bench_step(Stage(config, config.stages.index(stage)), collectives, options.steps)
        if collectives.rank == 0:
            measured = {"stage": stage.name, "world_size": collectives.world_size, **result.as_json()}
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
