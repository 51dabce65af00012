"""ImageBERT's four objectives: shared forwards, negatives, and a tiny model that learns all four."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives import Objective
from pipeline.objectives.mlm import MLM
from pipeline.objectives.moc import MOC
from pipeline.objectives.mrfr import MRFR
from pipeline.training.collectives import Collectives
from pipeline.training.stages import Stage, build_stage_model
from pipeline.training.step import TrainingStep
from tests.support.gradients import PlainEngine
from tests.support.trial import COLLAPSED_1_TO_1, VOCABULARY, invented_batch, twice

OBJECTIVES = ("itm", "mlm", "moc", "mrfr")
ROWS = 12


def run_config(dropout: float = 0.0, **engine: int) -> RunConfig:
    model = {
        "kind": "imagebert", "width": 32, "layers": 2, "heads": 2, "max_text_length": 12, "max_regions": 6,
        "region_features": 8, "region_classes": 7, "init_std": 0.2, "dropout": dropout,
    }  # fmt: skip
    stage = {
        "name": "regions", "sources": {"some": 1.0}, "objectives": {name: {} for name in OBJECTIVES}, "steps": 30,
        "global_batch_size": ROWS, "max_text_length": 12, "negatives": "random",
        "optimizer": {"lr": 1e-2, "warmup_steps": 3, "lr_schedule": "constant", "weight_decay": 0.0},
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


@pytest.fixture(scope="module")
def collectives() -> Iterator[Collectives]:
    alone = Collectives()
    yield alone
    alone.close()


class Watched(PlainEngine):
    """Engine that records the forwards it receives."""

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        self.asked = passes
        return super().__call__(passes)


def training(config: RunConfig, collectives: Collectives) -> tuple[Watched, TrainingStep, Batch]:
    stage = config.stages[0]
    engine = Watched(build_stage_model(Stage(config, 0), Storage(), VOCABULARY), stage.optimizer)
    step = TrainingStep(engine, Stage(config, 0), collectives)
    return engine, step, twice(invented_batch(config.model, "regions", 0, ROWS // 2))


def test_all_four_losses_fall_in_thirty_steps(collectives: Collectives) -> None:
    engine, step, batch = training(run_config(), collectives)
    losses = []
    for _ in range(31):
        losses.append({name: float(loss) for name, loss in step(batch).items()})
        engine.step(1e-2)
    first, last = losses[0], losses[-1]
    for objective in OBJECTIVES:
        assert last[objective] < 0.5 * first[objective], (objective, first[objective], last[objective])
    assert last["itm"] < 0.8 * COLLAPSED_1_TO_1


def test_mlm_moc_and_mrfr_share_one_forward(collectives: Collectives) -> None:
    engine, step, batch = training(run_config(), collectives)
    step(batch)
    assert set(engine.asked) == {"masked", "pair"}
    assert engine.asked["masked"].heads == ("mlm", "moc", "mrfr")
    assert engine.asked["pair"].heads == ("itm",)


def test_regions_are_zeroed_only_in_the_masked_forward(collectives: Collectives) -> None:
    engine, step, batch = training(run_config(), collectives)
    step(batch)
    hidden, shown = engine.asked["masked"].regions, engine.asked["pair"].regions
    assert hidden is not None
    assert shown is not None
    zeroed = (hidden.features == 0).all(dim=-1)
    assert torch.equal(zeroed[batch.region_keep], batch.region_hidden[batch.region_keep])
    assert not (shown.features[shown.keep] == 0).any()


def test_negative_has_the_caption_or_regions_of_another_row(collectives: Collectives) -> None:
    engine, step, batch = training(run_config(), collectives)
    exchanged = {"caption": 0, "regions": 0}
    for number in range(20):
        step(replace(batch, step=number))
        pair = engine.asked["pair"]
        other_text = (pair.text != batch.text).any(dim=1)
        other_regions = (pair.regions.location != batch.region_location).flatten(1).any(dim=1)
        assert not (other_text & other_regions).any()
        assert int((other_text | other_regions).sum()) == ROWS / 2
        exchanged["caption"] += int(other_text.sum())
        exchanged["regions"] += int(other_regions.sum())
    assert min(exchanged.values()) > 0.3 * sum(exchanged.values())


def test_trap_06_only_itm_reads_negatives() -> None:
    """The paper's conditional mask: MLM, MOC and MRFR read matched pairs only, so they swap no rows."""
    for objective in (MLM, MOC, MRFR):
        assert objective.swaps is Objective.swaps


def test_each_loss_is_the_mean_over_masked_positions(collectives: Collectives) -> None:
    """Padding the masked positions of every example changes no loss."""
    engine, step, batch = training(run_config(), collectives)
    once = step(batch)
    engine.step(0.0)
    half = replace(batch, region_positions=torch.cat([batch.region_positions, torch.full((ROWS, 2), -1)], dim=1))
    again = step(half)
    for objective in OBJECTIVES:
        torch.testing.assert_close(once[objective], again[objective])


def test_dropout_depends_on_the_step_alone(collectives: Collectives) -> None:
    engine, step, batch = training(run_config(dropout=0.1), collectives)
    engine.model.train()
    torch.manual_seed(1)
    first = step(batch)["loss"]
    torch.manual_seed(2)
    torch.testing.assert_close(step(batch)["loss"], first, rtol=0, atol=0)
    assert step(replace(batch, step=1))["mlm"] != step(batch)["mlm"]
