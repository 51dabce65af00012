"""The gradient table (contract C2): one global batch's gradient, however it is cut and sharded, against plain autograd.

One batch of pairs, some of which show the same image, goes through a small VLMo with drop path and all its objectives
(contrast, matching with hard negatives, masked words, masked patches) in float32. Each cell is one way of cutting it
into ranks, micro-batches and accumulation, and one ZeRO stage with or without offload; each parameter's gradient is
compared with that of plain autograd in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jobs.console import aligned
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.training.collectives import Collectives, share
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.local_ranks import run_ranks
from pipeline.training.plain_engine import PlainEngine
from pipeline.training.stages import build_stage_model
from pipeline.training.steps import TrainingStep, accumulation
from pipeline.training.trial import VOCABULARY, invented_batch, tiny_section

BATCH = 48
STEP = 1  # whose data, negatives and drop-path masks are used
TOLERANCE = 1e-5  # of a relative error as `relative_errors` defines it
SECONDS = 3600.0  # that one layout may take, on a machine that does other things besides

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How a global batch is cut. Shares differ by one row where the ranks do not divide it."""

    ranks: int
    micro_batch: int  # most rows of one forward

    def __str__(self) -> str:
        return f"{self.ranks}x{self.micro_batch}x{accumulation(BATCH, self.ranks, self.micro_batch)}"


@dataclass(frozen=True)
class Sharding:
    """A ZeRO stage, and what it keeps in host memory."""

    zero_stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __str__(self) -> str:
        offloaded = {"optimizer": self.offload_optimizer, "parameters": self.offload_parameters}
        return "+".join([f"ZeRO {self.zero_stage}", *(name for name, wanted in offloaded.items() if wanted)])


LAYOUTS = (Layout(1, 48), Layout(2, 24), Layout(2, 8), Layout(4, 6), Layout(3, 16), Layout(5, 10))
SHARDINGS = (
    *(Sharding(stage) for stage in range(4)),
    *(Sharding(stage, offload_optimizer=True) for stage in (1, 2, 3)),
    Sharding(3, offload_optimizer=True, offload_parameters=True),
)


def bench_gradients(
    layouts: Iterable[Layout] = LAYOUTS,
    shardings: Iterable[Sharding] = SHARDINGS,
    progress: Callable[[str], None] = lambda told: None,
) -> dict[str, Any]:
    """Every cell's worst relative error, and every parameter's worst with its cell."""
    shardings = tuple(shardings)
    progress("autograd in one process")
    expected = plain_gradients()
    cells: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Any]] = {name: {"error": -1.0} for name in expected}
    for layout in layouts:
        progress(f"ranks x micro-batch x accumulation: {layout}")
        for sharding, got in zip(shardings, engine_gradients(layout, shardings), strict=True):
            errors = relative_errors(expected, got)
            worst = max(errors, key=errors.__getitem__)
            cell = {"layout": str(layout), "sharding": str(sharding), "error": errors[worst], "parameter": worst}
            cells[f"{layout} {sharding}"] = cell
            for name, error in errors.items():
                if error > parameters[name]["error"]:
                    parameters[name] = {"error": error, "cell": f"{layout} {sharding}"}
    return {
        "batch": BATCH,
        "tolerance": TOLERANCE,
        "is_within": all(cell["error"] <= TOLERANCE for cell in cells.values()),
        "cells": list(cells.values()),
        "parameters": parameters,
    }


def relative_errors(expected: Gradients, got: Gradients) -> dict[str, float]:
    """Of each parameter |g - g*| / (|g*| + 0.01 |all g*|): at most 1e-5 is C2's |g - g*| <= 1e-5 |g*| + 1e-7 |all g*|.

    Infinite where a gradient is missing or of another shape.
    """
    everything = torch.stack([g.double().norm() for g in expected.values()]).norm()
    errors = {}
    for name, gradient in expected.items():
        if name not in got or got[name].shape != gradient.shape:
            errors[name] = float("inf")
            continue
        difference = (got[name].double() - gradient.double()).norm()
        errors[name] = float(difference / (gradient.double().norm() + 0.01 * everything))
    return errors | {name: float("inf") for name in got.keys() - expected.keys()}


def plain_gradients() -> Gradients:
    return run_ranks(_plain, 1, seconds=SECONDS)[0]


def engine_gradients(layout: Layout, shardings: Iterable[Sharding]) -> list[Gradients]:
    """Of every sharding, one after the other on the same ranks."""
    return run_ranks(_through_engines, layout.ranks, layout, tuple(shardings), seconds=SECONDS)[0]


def table_config(**engine: Any) -> RunConfig:
    """The run whose batch is cut."""
    stage = {
        "name": "vision_language",
        "sources": {"pairs": 1.0},
        # Micro-batches of three rows then often have none that masked_image reads.
        "objectives": {
            "contrastive": {},
            "matching": {"every": 2},
            "masked_language": {},
            "masked_image": {"every": 4},
        },
        "steps": 100,
        "batch": BATCH,
        "max_text": 12,
        "optimizer": {"peak_rate": 1e-3, "warmup_steps": 2, "clip_norm": 1.0},
    }
    values = {
        "name": "gradients",
        "seed": 3,
        "model": tiny_section("vlmo").model_dump() | {"drop_path": 0.1},
        "sources": {"pairs": {"shards": "invented"}},
        "data": {"lanes": 2},
        "stages": [stage],
        "engine": {"precision": "float32", **engine},
    }
    return validate(values, "gradients")


def table_batch(config: RunConfig, step: int, rank: int, world_size: int) -> Batch:
    """This rank's rows; every second pair shows the image before, so that equals are told from negatives."""
    batch = invented_batch(config.model, "pairs", step, BATCH)
    batch = replace(batch, image_id=torch.arange(BATCH) // 2 * 2)
    return batch.rows(slice(*share(BATCH, rank, world_size)))


def _plain() -> Gradients:
    config = table_config()
    stage = config.stages[0]
    engine = PlainEngine(build_stage_model(config, 0, Storage(), VOCABULARY), stage.optimizer)
    TrainingStep(engine, config, stage, Collectives())(table_batch(config, STEP, 0, 1))
    return engine.gradients()


def _through_engines(layout: Layout, shardings: tuple[Sharding, ...]) -> list[Gradients] | None:
    collectives = Collectives()
    found = [_through_engine(collectives, layout, sharding) for sharding in shardings]
    return found if collectives.rank == 0 else None  # all ranks hold the same: only one need send it


def _through_engine(collectives: Collectives, layout: Layout, sharding: Sharding) -> Gradients:
    config = table_config(micro_batch=layout.micro_batch, **asdict(sharding))
    stage = config.stages[0]
    engine = DeepSpeedEngine(build_stage_model(config, 0, Storage(), VOCABULARY), config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    step(table_batch(config, STEP, collectives.rank, collectives.world_size))
    gradients = engine.gradients()
    engine.close()
    return gradients


def as_text(found: dict[str, Any]) -> str:
    """Two tables: the worst error of every cell, and of every parameter."""
    layouts, shardings = (list(dict.fromkeys(cell[key] for cell in found["cells"])) for key in ("layout", "sharding"))
    errors = {(cell["layout"], cell["sharding"]): f"{cell['error']:.1e}" for cell in found["cells"]}
    header = ["", *layouts]
    rows = [[sharding, *(errors[layout, sharding] for layout in layouts)] for sharding in shardings]
    parameters = [[name, f"{worst['error']:.1e}", worst["cell"]] for name, worst in found["parameters"].items()]
    told = [
        "worst relative error of a cell's parameters; ranks x micro-batch x accumulation",
        aligned([header, *rows]),
        "worst cell of each parameter",
        aligned(parameters),
        f"{'all' if found['is_within'] else 'NOT all'} within {found['tolerance']:.0e}",
    ]
    return "\n\n".join(told)
