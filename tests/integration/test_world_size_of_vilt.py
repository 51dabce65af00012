"""Contract C2 for pictures of their own shape: each rank pads to its own largest, and the gradient is one process's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks

Answer = tuple[dict[str, Tensor], dict[str, float]]
STAGES: dict[str, dict[str, Any]] = {
    "pretraining": {"itm": {}, "wpa": {"weight": 0.1}, "mlm": {}, "mim": {"every": 2}},
    "ranking": {"ranking": {}},
}
ROWS = 12


def _config(objectives: dict[str, Any], **engine: Any):
    from pipeline.config.load import validate
    from tests.support.trial import tiny_section

    stage = {
        "name": "pairs",
        "sources": {"pairs": 1.0},
        "objectives": objectives,
        "negatives": "random",
        "image_target": "mean_colour",
        "num_negative_texts": 3,
        "steps": 4,
        "global_batch_size": ROWS,
        "max_text_length": 12,
    }
    values = {
        "name": "vilt",
        "seed": 3,
        "model": tiny_section("vilt").model_dump() | {"drop_path": 0.1},
        "sources": {"pairs": {"shards": "pairs"}},
        "data": {"streams": 2},
        "stages": [stage],
        "engine": {"precision": "float32", **engine},
    }
    return validate(values, "vilt")


def _rows(config, rank: int, world_size: int):
    """This rank's rows, cut to its own tallest and widest picture and its own longest text."""
    from pipeline.training.collectives import share
    from tests.support.trial import invented_batch

    rows = invented_batch(config.model, "pairs", 1, ROWS).rows(slice(*share(ROWS, rank, world_size)))
    height, width = rows.image_size.max(dim=0).values.tolist()
    most, longest = int((rows.visible_patches >= 0).sum(dim=1).max()), int(rows.text_keep.sum(dim=1).max())
    cut = {name: getattr(rows, name)[:, :longest] for name in ("text", "text_keep", "masked_text")}
    return replace(rows, image=rows.image[:, :height, :width], visible_patches=rows.visible_patches[:, :most], **cut)


def _plain() -> dict[str, Answer]:
    from pipeline.data.storage import Storage
    from pipeline.training.collectives import Collectives
    from pipeline.training.plain_engine import PlainEngine
    from pipeline.training.stages import build_stage_model
    from pipeline.training.steps import TrainingStep
    from tests.support.trial import VOCABULARY

    answers = {}
    collectives = Collectives()
    for name, objectives in STAGES.items():
        config = _config(objectives)
        stage = config.stages[0]
        engine = PlainEngine(build_stage_model(config, 0, Storage(), VOCABULARY), stage.optimizer)
        losses = TrainingStep(engine, config, stage, collectives)(_rows(config, 0, 1))
        answers[name] = engine.gradients(), {key: float(loss) for key, loss in losses.items()}
    return answers


def _ranked(zero_stage: int, micro_batch_size: int | None) -> dict[str, Answer]:
    from pipeline.data.storage import Storage
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.stages import build_stage_model
    from pipeline.training.steps import TrainingStep
    from tests.support.trial import VOCABULARY

    answers = {}
    collectives = Collectives()
    for name, objectives in STAGES.items():
        config = _config(objectives, zero_stage=zero_stage, micro_batch_size=micro_batch_size)
        stage = config.stages[0]
        engine = DeepSpeedEngine(build_stage_model(config, 0, Storage(), VOCABULARY), config, stage, collectives)
        step = TrainingStep(engine, config, stage, collectives)
        losses = step(_rows(config, collectives.rank, collectives.world_size))
        summed = {key: float(collectives.sum(loss)) for key, loss in losses.items()}
        answers[name] = engine.gradients(), summed
        engine.close()
    return answers


@pytest.fixture(scope="module")
def plain() -> dict[str, Answer]:
    return run_ranks(_plain, 1)[0]


@pytest.mark.parametrize(("world_size", "zero_stage", "micro_batch_size"), [(1, 2, 5), (3, 3, 2)])
def test_gradient_of_shaped_pictures_is_that_of_one_process(plain, world_size, zero_stage, micro_batch_size) -> None:
    answers = run_ranks(_ranked, world_size, zero_stage, micro_batch_size)[0]
    for name, (expected, expected_losses) in plain.items():
        got, losses = answers[name]
        # Word-patch alignment is a difference of distances, which may be near 0.
        assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-7), name
        assert got.keys() == expected.keys()
        everything = torch.sqrt(sum(g.double().square().sum() for g in expected.values()))
        for parameter, gradient in expected.items():
            error = (got[parameter].double() - gradient.double()).norm()
            assert error <= 1e-5 * gradient.double().norm() + 1e-7 * everything, (name, parameter, float(error))
