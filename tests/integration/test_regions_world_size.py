"""Contract C2 for ImageBERT: regions travel between ranks as captions do, and all shares give one gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from tests.support.ranks import run_ranks

ROWS = 10  # which neither 3 ranks nor micro-batches of 2 divide evenly
Found = tuple[dict[str, Tensor], dict[str, float]]


def _config(**engine: object) -> RunConfig:
    model = {
        "kind": "imagebert", "width": 32, "layers": 2, "heads": 2, "max_text_length": 12, "max_regions": 6,
        "region_features": 8, "region_classes": 7, "init_std": 0.2, "dropout": 0.0,
    }  # fmt: skip
    objectives = {
        "itm": {"every": 2},
        "mlm": {},
        "moc": {},
        "mrfr": {"weight": 0.1},
    }
    stage = {
        "name": "regions", "sources": {"some": 1.0}, "objectives": objectives, "steps": 4, "global_batch_size": ROWS,
        "max_text_length": 12, "negatives": "random",
    }  # fmt: skip
    return validate(
        {
            "name": "test",
            "model": model,
            "sources": {"some": {"shards": "invented", "type": "regions"}},
            "data": {"streams": 1},
            "stages": [stage],
            "engine": {"precision": "float32", **engine},
        },
        "test",
    )


def _gradients(plain: bool, zero_stage: int = 0, micro_batch_size: int | None = None) -> Found:
    """The global gradient and losses of one batch, on this rank."""
    from pipeline.data.storage import Storage
    from pipeline.training.collectives import Collectives, share
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.plain_engine import PlainEngine
    from pipeline.training.stages import build_stage_model
    from pipeline.training.steps import TrainingStep
    from tests.support.trial import VOCABULARY, invented_batch

    config = _config(zero_stage=zero_stage, micro_batch_size=micro_batch_size)
    stage, collectives = config.stages[0], Collectives()
    model = build_stage_model(config, 0, Storage(), VOCABULARY)
    engine = PlainEngine(model, stage.optimizer) if plain else DeepSpeedEngine(model, config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    batch = invented_batch(config.model, "regions", 1, ROWS)
    batch.region_keep[:4, -1] = False
    rows = batch.rows(slice(*share(ROWS, collectives.rank, collectives.world_size)))
    most = int(rows.region_keep.sum(dim=1).max())  # as the loader cuts them: fewer on the rank of the first rows
    names = ("mrfr", "region_location", "region_keep", "moc", "region_hidden")
    rows = replace(rows, **{name: getattr(rows, name)[:, :most] for name in names})
    losses = {name: float(collectives.sum(loss)) for name, loss in step(rows).items()}
    return engine.gradients(), losses


@pytest.fixture(scope="module")
def plain() -> Found:
    return run_ranks(_gradients, 1, True)[0]


@pytest.mark.parametrize(("world_size", "zero_stage", "micro_batch_size"), [(3, 1, None), (2, 3, 2)])
def test_gradient_and_losses_are_the_same_for_every_share(
    plain: Found, world_size: int, zero_stage: int, micro_batch_size: int | None
) -> None:
    expected, expected_losses = plain
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for gradients, losses in run_ranks(_gradients, world_size, False, zero_stage, micro_batch_size):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7 * whole, name
