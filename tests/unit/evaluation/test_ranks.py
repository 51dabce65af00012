"""An evaluation distributed over any number of ranks is bit-equal to that of one process."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.errors import DataError
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, rank_batches, run_on_all_ranks
from pipeline.models import build_model
from pipeline.models.model import HeadConfig
from tests.support.ranks import run_ranks


class One(Ranks):
    """One of several ranks, without collective calls."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def shares(self, count):
        return [(r * count // self.world_size, (r + 1) * count // self.world_size) for r in range(self.world_size)]


@pytest.mark.parametrize("count", [1, 7, 50, 64])
@pytest.mark.parametrize("world_size", [1, 2, 9])
def test_rows_are_computed_once_with_equal_forward_counts(count, world_size):
    turns = [list(rank_batches(count, 7, One(rank, world_size))) for rank in range(world_size)]
    own = [row for of_rank in turns for rows, is_own in of_rank if is_own for row in range(count)[rows]]
    assert own == list(range(count))
    assert len({len(of_rank) for of_rank in turns}) == 1
    assert all(0 < rows.stop - rows.start <= 7 for of_rank in turns for rows, _ in of_rank)


def test_an_error_of_one_rank_is_raised_on_all():
    class Two(Ranks):
        def gather_objects(self, value):
            return [value, (None, DataError("shard 3 changed"))]

    with pytest.raises(DataError, match="shard 3 changed"):
        run_on_all_ranks(Two(), lambda: 1)


def evaluated(config, ranks=None):
    """Return all results of one rank: metrics, ranks, best candidates, predictions."""
    from pipeline.training.collectives import Collectives

    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(["a red square", "two blue circles and a green star"], 200)
    model = build_model(config.model, tokenizer.size, HeadConfig("pixels"), seed=3)
    result = evaluate(model, tokenizer, config, Storage(), others={"language": model}, ranks=ranks or Collectives())
    tensors = [*vars(result.rankings.image_to_text).values(), *vars(result.rankings.text_to_image).values()]
    tensors += [result.mlm.own_image.truth_probability, result.mlm.text_only.tokens]
    return result.to_json(), result.metrics(), tensors


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_do_not_depend_on_the_number_of_ranks(config, world_size):
    values, metrics, tensors = evaluated(config, SINGLE_PROCESS)
    for own_values, own_metrics, own_tensors in run_ranks(evaluated, world_size, config):
        assert own_values == values
        assert own_metrics == metrics
        assert all(torch.equal(mine, other) for mine, other in zip(own_tensors, tensors, strict=True))
