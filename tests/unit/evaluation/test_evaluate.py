"""The evaluation of a tiny model has the documented JSON and equal metrics for every batch size."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.config.errors import ConfigError
from pipeline.config.schema import DualEncoderConfig, ObjectiveConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.retrieval import fusion_scores
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput

KS = {"r1", "r5", "r10"}


@pytest.fixture
def matching_only(config):
    """Return the run with ITM as the only objective of its last stage, which then gives no ranking by ITC."""
    changes = {"objectives": {"itm": ObjectiveConfig()}, "negatives": "random"}
    stages = (*config.stages[:-1], config.stages[-1].model_copy(update=changes))
    return config.model_copy(update={"stages": stages})


def test_json_has_the_documented_keys(evaluation):
    result = json.loads(json.dumps(evaluation.to_json()))
    assert (result["pairs"], result["captions"]) == (24, 48)
    for direction in ("image_to_text", "text_to_image", "chance"):
        assert result["retrieval"][direction].keys() >= KS
    assert result["reranked"]["best"] == 10
    mlm = result["mlm"]
    assert mlm.keys() >= {"accuracy", "accuracy_other_image", "accuracy_text_only", "language_stage_text_only"}
    assert mlm["language_stage_text_only"] == mlm["accuracy_text_only"]  # the language stage has the same weights
    assert result["reconstruction"]["stage"] == "vision"


def test_metrics_are_flat_numbers_under_the_source(evaluation):
    metrics = evaluation.metrics()
    assert all(name.startswith("eval/unseen/") and isinstance(value, float) for name, value in metrics.items())
    assert metrics["eval/unseen/i2t_r1"] == pytest.approx(evaluation.retrieval.image_to_text.at[1])
    assert {"eval/unseen/mlm_accuracy", "eval/unseen/itm_accuracy", "eval/unseen/reranked_t2i_r10"} <= metrics.keys()


def test_similarity_is_the_mean_of_both_heads_cosines(evaluation, model):
    held_out, ranked = evaluation.held_out, evaluation.rankings.text_to_image
    image = ForwardInput(heads=("itc",), image=held_out.images[ranked.best[5, :1]])
    text = ForwardInput(heads=("itc",), text=torch.tensor([held_out.tokens[5].ids]))
    with torch.no_grad():
        of_image, of_text = model({"x": image})["x"], model({"x": text})["x"]
    expected = sum(of_image[head] @ of_text[head].T for head in ("itc", "itc_vl")) / 2
    torch.testing.assert_close(ranked.score[5, 0], expected[0, 0], atol=1e-6, rtol=1e-5)


def test_metrics_do_not_depend_on_the_batch_size(evaluation, model, config, storage, tokenizer):
    other = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": 64})})
    again = evaluate(model, tokenizer, other, storage)
    scores = (result.rankings.image_to_text.score for result in (evaluation, again))
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-5)
    assert evaluation.mlm.own_image.accuracy == again.mlm.own_image.accuracy
    assert evaluation.itm == again.itm


@pytest.mark.parametrize(
    ("stage", "null", "present"),
    [
        ("vision", ["retrieval", "reranked", "mlm", "itm"], ("reconstruction", "error")),
        ("language", ["retrieval", "itm", "reconstruction"], ("mlm", "accuracy_text_only")),
    ],
)
def test_results_of_untrained_objectives_are_null(stage, null, present, model, config, storage, tokenizer):
    result = evaluate(model, tokenizer, config, storage, stage=stage, limit=6).to_json()
    assert all(result[name] is None for name in null)
    assert result[present[0]][present[1]] is not None
    assert (result["mlm"] or {"accuracy": None})["accuracy"] is None


def test_single_pair_has_no_comparisons(model, config, storage, tokenizer):
    result = evaluate(model, tokenizer, config, storage, limit=1).to_json()
    assert result["mlm"]["accuracy_other_image"] is None
    assert result["itm"] is None
    assert result["retrieval"]["text_to_image"]["r1"] == result["retrieval"]["chance"]["r1"] == 1.0


def test_dual_encoder_is_evaluated_by_its_single_itc_head(config, storage, tokenizer):
    sizes = {"width": 32, "layers": 1, "text_layers": 1, "heads": 2, "image_size": 32, "patch_size": 8}
    stage = config.stages[-1].model_copy(update={"objectives": {"itc": ObjectiveConfig()}})
    dual = config.model_copy(update={"model": DualEncoderConfig(**sizes, embedding=16), "stages": (stage,)})
    result = evaluate(build_model(dual.model, tokenizer.size, seed=3), tokenizer, dual, storage)
    assert result.rankings.image_to_text.score.abs().max() <= 1 + 1e-5
    values = result.to_json()
    assert values["retrieval"]["image_to_text"].keys() >= KS
    assert all(values[name] is None for name in ("reranked", "itm", "mlm", "reconstruction"))


def test_itm_without_itc_ranks_by_scoring_every_pair(model, matching_only, storage, tokenizer):
    result = evaluate(model, tokenizer, matching_only, storage)
    held_out = result.held_out
    assert result.itm is not None
    assert result.reranked is None
    assert (result.retrieval_by, result.retrieval_images) == ("itm", len(held_out))
    pairs = torch.cartesian_prod(torch.arange(len(held_out)), torch.arange(len(held_out.tokens)))
    odds = fusion_scores(model, held_out.images, held_out.token_ids(), tokenizer.pad_id, pairs)
    best = odds.view(len(held_out), -1).topk(10, dim=1).values
    torch.testing.assert_close(result.rankings.image_to_text.score, best)
    assert evaluate(model, tokenizer, matching_only, storage, rerank_best=0).retrieval is None


def test_fused_retrieval_scores_only_the_first_images_of_many(model, matching_only, storage, tokenizer, monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.evaluate.RERANK_PAIRS", 30)
    result = evaluate(model, tokenizer, matching_only, storage)
    images = result.retrieval_images
    captions = int((result.held_out.caption_of < images).sum())
    assert 1 < images < len(result.held_out)
    assert images * captions <= 30
    assert result.rankings is None
    assert result.retrieval is not None


def test_unknown_stage_is_rejected_with_the_known_stages(model, config, storage, tokenizer):
    known = "no stage 'visoin' in this run; its stages: vision, language, vision_language"
    with pytest.raises(ConfigError, match=known):
        evaluate(model, tokenizer, config, storage, stage="visoin")
