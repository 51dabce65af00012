"""An evaluation distributed over any number of ranks is bit-equal to that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.errors import DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, rank_batches, run_on_all_ranks
from pipeline.models import build_model
from pipeline.models.model import HeadConfig
from tests.support.ranks import run_ranks


class One(Ranks):
    """One of several ranks, without collective calls."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size

    def shares(self, count: int) -> list[tuple[int, int]]:
        return [(r * count // self.world_size, (r + 1) * count // self.world_size) for r in range(self.world_size)]


@pytest.mark.parametrize("count", [1, 6, 7, 50, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_rows_are_computed_once_with_equal_forward_counts(count: int, world_size: int) -> None:
    turns = [list(rank_batches(count, 7, One(rank, world_size))) for rank in range(world_size)]
    own = [row for each in turns for rows, is_own in each if is_own for row in range(count)[rows]]
    assert own == list(range(count))
    assert len({len(each) for each in turns}) == 1
    assert all(0 < rows.stop - rows.start <= 7 for each in turns for rows, _ in each)


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    class Two(Ranks):
        def gather_objects(self, value: Any) -> list[Any]:
            return [value, (None, DataError("shard 3 changed"))]

    with pytest.raises(DataError, match="shard 3 changed"):
        run_on_all_ranks(Two(), lambda: 1)


def measured(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Return all results of one rank: metrics, ranks, best candidates, predictions."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(["a red square", "two blue circles and a green star"], 200)
    model = build_model(config.model, tokenizer.size, HeadConfig("pixels"), seed=3)
    found = evaluate(model, tokenizer, config, Storage(), others={"language": model}, ranks=ranks)
    tensors = [*vars(found.rankings.image_to_text).values(), *vars(found.rankings.text_to_image).values()]
    tensors += [found.mlm.own_image.truth_probability, found.mlm.text_only.tokens]
    return {"json": found.to_json(), "metrics": found.metrics(), "tensors": tensors}


def measured_on_ranks(config: RunConfig) -> dict[str, Any]:
    from pipeline.training.collectives import Collectives

    return measured(config, Collectives())


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_do_not_depend_on_the_number_of_ranks(config: RunConfig, world_size: int) -> None:
    expected = measured(config, SINGLE_PROCESS)
    for found in run_ranks(measured_on_ranks, world_size, config):
        assert found["json"] == expected["json"]
        assert found["metrics"] == expected["metrics"]
        assert all(torch.equal(mine, other) for mine, other in zip(found["tensors"], expected["tensors"], strict=True))
