"""ImageBERT's four objectives in one step: shared forwards, negatives and dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.objectives import Objective
from pipeline.objectives.mlm import MLM
from pipeline.objectives.moc import MOC
from pipeline.objectives.mrfr import MRFR
from pipeline.training.collectives import Collectives
from tests.support.trial import ROWS, TrialState, begin, tiny_run

OBJECTIVES = ("itm", "mlm", "moc", "mrfr")


def trial(collectives: Collectives, dropout: float = 0.0) -> TrialState:
    objectives = {name: {} for name in OBJECTIVES}
    return begin(tiny_run("imagebert", "regions", objectives, {"dropout": dropout}, negatives="random"), collectives)


def test_masked_objectives_share_one_forward_with_zeroed_regions(collectives: Collectives) -> None:
    begun = trial(collectives)
    batch = begun.batch
    begun.step(batch)
    forwards = begun.engine.forwards
    assert {name: forward.heads for name, forward in forwards.items()} == {
        "masked": ("mlm", "moc", "mrfr"),
        "pair": ("itm",),
    }
    hidden, shown = forwards["masked"].regions, forwards["pair"].regions
    zeroed = (hidden.features == 0).all(dim=-1)
    assert torch.equal(zeroed[batch.region_keep], batch.region_hidden[batch.region_keep])
    assert not (shown.features[shown.keep] == 0).any()


def test_negative_has_the_caption_or_regions_of_another_row(collectives: Collectives) -> None:
    begun = trial(collectives)
    batch = begun.batch
    exchanged = {"caption": 0, "regions": 0}
    for number in range(20):
        begun.step(replace(batch, step=number))
        pair = begun.engine.forwards["pair"]
        other_text = (pair.text != batch.text).any(dim=1)
        other_regions = (pair.regions.location != batch.region_location).flatten(1).any(dim=1)
        assert not (other_text & other_regions).any()
        assert int((other_text | other_regions).sum()) == ROWS / 2
        exchanged["caption"] += int(other_text.sum())
        exchanged["regions"] += int(other_regions.sum())
    assert min(exchanged.values()) > 0.3 * sum(exchanged.values())


@pytest.mark.parametrize("objective", [MLM, MOC, MRFR])
def test_trap_06_only_itm_reads_negatives(objective: type[Objective]) -> None:
    """The paper's conditional mask: MLM, MOC and MRFR read matched pairs only, so they swap no rows."""
    assert objective.swaps is Objective.swaps


def test_dropout_depends_on_the_step_alone(collectives: Collectives) -> None:
    begun = trial(collectives, dropout=0.1)
    begun.engine.model.train()
    torch.manual_seed(1)
    first = begun.step(begun.batch)
    torch.manual_seed(2)
    torch.testing.assert_close(begun.step(begun.batch), first, rtol=0, atol=0)
    assert begun.step(replace(begun.batch, step=1))["mlm"] != first["mlm"]
