"""`mome bench step`: time and memory of training steps, with random weights and synthetic batches of maximum size.

On several machines: torchrun … -m jobs.bench.step CONFIG [--stage NAME] [key=value …]
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pipeline.config.errors import MomeError
from pipeline.config.load import load_config
from pipeline.data.order import share
from pipeline.data.storage import Storage
from pipeline.planning.estimate import TERA, accelerator_like, memory_of
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import sharding_of
from pipeline.training.profile import MeasuredEngine, living, peak_of
from pipeline.training.stages import Stage, build_stage_model
from pipeline.training.step import TrainingStep
from pipeline.training.workload import full_batch, with_micro_batch, work_of


def bench_step(stage: Stage, collectives: Collectives, steps: int = 5) -> dict[str, Any]:
    """Measure steps of a stage on all ranks together; with `steps` 0, only the one that measures memory.

    TFLOPS are of one rank, bytes of the rank with the largest allocation. `mfu` is a fraction of the data sheet's peak,
    or on a CPU of the speed of a large matrix product.
    """
    torch.set_num_threads(stage.run.engine.threads)
    device, vocabulary = collectives.device, stage.run.tokenizer.size
    on_cuda = device.type == "cuda"
    stages = tuple(config.model_copy(update={"start_from": "random"}) for config in stage.run.stages)
    stage = Stage(stage.run.model_copy(update={"stages": stages}), stage.index)
    stage = with_micro_batch(stage, collectives, vocabulary)
    batch_size, before = stage.config.global_batch_size, living(device)
    engine = MeasuredEngine(build_stage_model(stage, Storage(), vocabulary), stage, collectives)
    step = TrainingStep(engine, stage, collectives)
    rows = slice(*share(batch_size, collectives.rank, collectives.world_size))
    num_rows = rows.stop - rows.start
    batch = full_batch(stage.run, stage.config, vocabulary).rows(rows)

    gradients = 0

    def run(measures_gradients: bool = False) -> None:
        nonlocal gradients
        step(batch)
        if measures_gradients:
            gradients = engine.memory()["gradients"]
        engine.step(stage.config.optimizer.lr)

    seconds = 0.0
    if steps:
        for _ in range(2):  # the warm-up
            run()
        collectives.barrier()
        started = time.perf_counter()
        for _ in range(steps):
            run()
        if on_cuda:
            torch.cuda.synchronize(device)
        collectives.barrier()
        seconds = (time.perf_counter() - started) / steps
    members = [member for member in vars(batch).values() if isinstance(member, torch.Tensor)]
    batch_bytes = sum(member.untyped_storage().nbytes() for member in members)
    held = sum(size for address, size in living(device).items() if address not in before) - batch_bytes
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(engine.record_saved, lambda tensor: tensor):
        peak = held + peak_of(partial(run, measures_gradients=True), device)
    seconds = seconds or time.perf_counter() - started
    memory = engine.memory()
    states = memory["parameters"] + memory["optimizer"]
    categories = {"states": states, "gradients": gradients, "activations": engine.activation_bytes}
    engine.close()

    # The estimate for this rank's examples, in its micro-batches.
    work = work_of(stage, vocabulary, "cuda" if on_cuda else "cpu")
    at_once = -(-num_rows // step.accumulation)
    sharding, activations = sharding_of(stage, collectives.world_size, on_cuda), work.activations.at(at_once)
    batch_memory, workspace = work.batch_bytes_per_example * num_rows, work.workspace.at(at_once)
    estimate = memory_of(work.parameters, sharding, activations, workspace, batch_memory).as_json()
    total, *parts = collectives.largest([peak, *categories.values()])
    flops = work.step_flops(num_rows, step.accumulation)
    return {
        "pairs_per_second": batch_size / seconds,
        "step_seconds": seconds,
        "tflops": flops / seconds / TERA,
        "mfu": flops / seconds / _reachable(device),
        "peak_memory_bytes": total,
        "measured": dict(zip(categories, parts, strict=True)) | {"total": total},
        "predicted": {name: estimate[name] for name in (*categories, "total")},
    }


def _reachable(device: torch.device) -> float:
    """Return the peak FLOP/s that MFU refers to: the data sheet's, or the measured speed of a large matrix product."""
    if device.type == "cuda" and (known := accelerator_like(torch.cuda.get_device_name(device))):
        return known.flops
    size, dtype = (2048, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    matrix, seconds = torch.randn(size, size, device=device, dtype=dtype), list[float]()
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def main(
    config: Path,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    stage: Annotated[str | None, typer.Option(help="Name of the stage (default: the last one).")] = None,
    steps: Annotated[int, typer.Option(help="Number of timed steps; 0 runs only the step that measures memory.")] = 5,
) -> None:
    """Measure the steps of a stage on the ranks that torchrun started."""
    collectives = None
    try:
        run = load_config(config, overrides or [])
        chosen = run.stage_named(stage)
        collectives = Collectives()
        result = bench_step(Stage(run, run.stages.index(chosen)), collectives, steps)
        if collectives.rank == 0:
            ratio = {name: round(result["predicted"][name] / size, 4) for name, size in result["measured"].items()}
            place = {"stage": chosen.name, "world_size": collectives.world_size}
            print(json.dumps({**place, **result, "predicted_to_measured": ratio}), flush=True)
    except MomeError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from error
    finally:
        if collectives is not None:
            collectives.close()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)  # `mome bench step` reads plain tracebacks
    app.command()(main)
    app()
