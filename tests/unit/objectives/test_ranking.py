"""Ranking: negative texts are distinct and drawn per example, and the loss is the first text's cross-entropy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.evaluation.evaluate import evaluate
from pipeline.models import build_model
from pipeline.models.model import HeadConfig
from pipeline.objectives import NegativePool
from pipeline.objectives.ranking import draw_distinct_negatives
from pipeline.training.collectives import Collectives
from tests.support.trial import ROWS, Cell, begin, invented_batch, tiny_run, trial_config

KEYS = torch.rand(600, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_negative_texts_are_distinct_of_other_images_if_there_are_enough_and_uniform() -> None:
    image_id = torch.tensor([3, 3, 5, 6, 7, 8, 9, 9])
    drawn = draw_distinct_negatives(KEYS[:8], image_id, image_id, 4)
    assert (image_id[drawn] != image_id[:, None]).all()
    assert all(len(row.unique()) == 4 for row in drawn)
    assert torch.equal(draw_distinct_negatives(KEYS[2:5], image_id[2:5], image_id, 4), drawn[2:5])
    drawn = draw_distinct_negatives(KEYS[:3, :3], torch.arange(3), torch.arange(3), 5)
    for row, others in enumerate(drawn.tolist()):
        assert set(others) == {0, 1, 2} - {row}
        assert others[:2] == others[2:4]
    equal = torch.zeros(3, dtype=torch.int64)
    assert draw_distinct_negatives(KEYS[:3, :3], equal, equal, 2).shape == (3, 2)
    drawn = draw_distinct_negatives(KEYS[:, :6], torch.zeros(600), torch.arange(6), 2)
    counts = torch.bincount(drawn.flatten(), minlength=6)
    assert counts[0] == 0
    assert ((counts[1:] - 240).abs() < 60).all()


def test_each_image_is_read_with_its_own_and_negative_texts() -> None:
    config = trial_config(Cell("ranking", "vilt", "pairs"))
    step, batch = begin(config, Collectives()).step, invented_batch(config.model, "pairs", 1, ROWS)
    calls: list[tuple[Any, Any]] = []
    step.engine.model.register_forward_hook(lambda module, given, outputs: calls.append((given[0], outputs)))
    losses = step(batch)
    ((forwards, outputs),) = calls
    assert set(forwards) == {"ranked", "wrong_text_0", "wrong_text_1", "wrong_text_2"}
    for name, forward in forwards.items():
        assert torch.equal(forward.image, batch.image)
        assert torch.equal(forward.visible_patches, batch.visible_patches)
        differs = (forward.text != batch.text).any(dim=1)
        assert differs.all() if name != "ranked" else not differs.any()
    scores = torch.stack([outputs[name]["ranking"] for name in forwards], dim=1)
    torch.testing.assert_close(losses["ranking"], -scores.log_softmax(dim=1)[:, 0].mean().detach())
    ranking, pool = step.objectives["ranking"], NegativePool(batch.image_id, batch.source)
    whole, part, later = (ranking.swaps(b, pool) for b in (batch, batch.rows(slice(3, 6)), replace(batch, step=2)))
    for name, swaps in whole.items():
        assert torch.equal(swaps[0].places[3:6], part[name][0].places)
    assert any(not torch.equal(later[name][0].places, whole[name][0].places) for name in whole)


def test_evaluation_retrieves_by_the_ranking_scores(make_pairs: Callable[..., str]) -> None:
    index_shards(Storage(), shards := make_pairs("pairs", [6]))
    run = tiny_run("vilt", "pairs", {"ranking": {}})
    source = run.sources["trial"].model_copy(update={"shards": shards})
    evaluation = run.evaluation.model_copy(update={"source": "trial"})
    run = run.model_copy(update={"sources": {"trial": source}, "evaluation": evaluation})
    tokenizer = Tokenizer.train([f"picture {n} shows a thing in way {way}" for n in range(9) for way in "abc"], 99)
    model = build_model(run.model, tokenizer.size, HeadConfig(ranking=True), seed=3)
    ranked = evaluate(model, tokenizer, run, Storage())
    captions = len(ranked.held_out.caption_of)
    assert (ranked.retrieval_by, ranked.rankings.text_to_image.best.shape) == ("ranking", (captions, 6))
