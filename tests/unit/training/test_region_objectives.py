"""ImageBERT's four objectives in one step: shared forwards, negatives and dropout."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.objectives import Objective, objective_type
from pipeline.training.collectives import Collectives
from tests.support.trial import ROWS, TrialState, begin, tiny_run


def trial(collectives: Collectives, dropout: float = 0.0) -> TrialState:
    objectives = {name: {} for name in ("itm", "mlm", "moc", "mrfr")}
    return begin(tiny_run("imagebert", "regions", objectives, {"dropout": dropout}, negatives="random"), collectives)


def test_trap_06_masked_objectives_share_one_forward_of_true_pairs_with_zeroed_regions(
    collectives: Collectives,
) -> None:
    """The paper's conditional mask: MLM, MOC and MRFR read matched pairs only, so they swap no rows."""
    begun = trial(collectives)
    batch = begun.batch
    begun.step(batch)
    masked, pair = (begun.engine.forwards[name] for name in ("masked", "pair"))
    assert begun.engine.forwards.keys() == {"masked", "pair"}
    assert (masked.heads, pair.heads) == (("mlm", "moc", "mrfr"), ("itm",))
    zeroed = (masked.regions.features == 0).all(dim=-1)
    assert torch.equal(zeroed[batch.region_keep], batch.region_hidden[batch.region_keep])
    assert not (pair.regions.features[pair.regions.keep] == 0).any()
    assert torch.equal(masked.text, batch.masked_text)
    for name in ("mlm", "moc", "mrfr"):
        assert objective_type(name).swaps is Objective.swaps


def test_negative_has_the_caption_or_regions_of_another_row(collectives: Collectives) -> None:
    begun = trial(collectives)
    batch, swapped = begun.batch, {"caption": 0, "regions": 0}
    for number in range(20):
        begun.step(replace(batch, step=number))
        pair = begun.engine.forwards["pair"]
        other_text = (pair.text != batch.text).any(dim=1)
        other_regions = (pair.regions.location != batch.region_location).flatten(1).any(dim=1)
        assert not (other_text & other_regions).any()
        assert int((other_text | other_regions).sum()) == ROWS / 2
        swapped["caption"] += int(other_text.sum())
        swapped["regions"] += int(other_regions.sum())
    assert min(swapped.values()) > 0.3 * sum(swapped.values())


def test_dropout_depends_on_the_step_alone(collectives: Collectives) -> None:
    begun = trial(collectives, dropout=0.1)
    begun.engine.model.train()
    torch.manual_seed(1)
    first = begun.step(begun.batch)
    torch.manual_seed(2)
    torch.testing.assert_close(begun.step(begun.batch), first, rtol=0, atol=0)
    assert begun.step(replace(begun.batch, step=1))["mlm"] != first["mlm"]
