"""Reference gradients of one global batch (contract C2): plain autograd, and the engine for any layout and sharding.

One batch of pairs, some of which show the same image, passes through a small VLMo with drop path and all of its
objectives in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.training.collectives import Collectives, share
from pipeline.training.deepspeed_engine import DeepSpeedEngine
from pipeline.training.engine import PlainEngine
from pipeline.training.stages import build_stage_model
from pipeline.training.steps import TrainingStep, accumulation
from tests.support.ranks import run_ranks
from tests.support.trial import VOCABULARY, invented_batch, tiny_section

BATCH = 48
STEP = 1  # determines the data, the negatives and the drop-path masks
TOLERANCE = 1e-5  # largest allowed error, as defined by `relative_errors`
SECONDS = 3600.0  # timeout of one layout on a busy machine

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Ranks and micro-batch size of a global batch. The ranks' parts differ by one example if they do not divide it."""

    ranks: int
    micro_batch_size: int  # maximum number of examples of one forward

    def __str__(self) -> str:
        return f"{self.ranks}x{self.micro_batch_size}x{accumulation(BATCH, self.ranks, self.micro_batch_size)}"


@dataclass(frozen=True)
class Sharding:
    """A ZeRO stage and its offloading to host memory."""

    zero_stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __str__(self) -> str:
        offloaded = {"optimizer": self.offload_optimizer, "parameters": self.offload_parameters}
        return "+".join([f"ZeRO {self.zero_stage}", *(name for name, wanted in offloaded.items() if wanted)])


def relative_errors(expected: Gradients, got: Gradients) -> dict[str, float]:
    """Return |g - g*| / (|g*| + 0.01 |all g*|) of each parameter; infinite for a missing or misshapen gradient.

    A value of at most 1e-5 is contract C2's |g - g*| <= 1e-5 |g*| + 1e-7 |all g*|.
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
    """Return the gradients of every sharding, computed one after the other on the same ranks."""
    return run_ranks(_through_engines, layout.ranks, layout, tuple(shardings), seconds=SECONDS)[0]


def table_config(**engine: Any) -> RunConfig:
    """Return the run whose global batch is divided."""
    stage = {
        "name": "vision_language",
        "sources": {"pairs": 1.0},
        # With `every: 4`, many micro-batches of three examples hold none that masked_image reads.
        "objectives": {
            "itc": {},
            "itm": {"every": 2},
            "mlm": {},
            "mim": {"every": 4},
        },
        "steps": 100,
        "global_batch_size": BATCH,
        "max_text_length": 12,
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "max_grad_norm": 1.0},
    }
    values = {
        "name": "gradients",
        "seed": 3,
        "model": tiny_section("vlmo").model_dump() | {"drop_path": 0.1},
        "sources": {"pairs": {"shards": "invented"}},
        "data": {"streams": 2},
        "stages": [stage],
        "engine": {"precision": "float32", **engine},
    }
    return validate(values, "gradients")


def table_batch(config: RunConfig, step: int, rank: int, world_size: int) -> Batch:
    """Return this rank's examples; every second pair repeats the image before it, which must not become a negative."""
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
    config = table_config(micro_batch_size=layout.micro_batch_size, **asdict(sharding))
    stage = config.stages[0]
    engine = DeepSpeedEngine(build_stage_model(config, 0, Storage(), VOCABULARY), config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    step(table_batch(config, STEP, collectives.rank, collectives.world_size))
    gradients = engine.gradients()
    engine.close()
    return gradients
