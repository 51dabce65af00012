"""The evaluation of a tiny model has the documented JSON and equal metrics for every batch size."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.config.errors import ConfigError
from pipeline.config.schema import DualEncoderConfig, ObjectiveConfig, RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.results import Evaluation
from pipeline.evaluation.retrieval import fusion_scores
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.models.vlmo import VLMo

KS = {"r1", "r5", "r10"}


@pytest.fixture(scope="module")
def found(model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer) -> Evaluation:
    return evaluate(model, tokenizer, config, storage, others={"vision": model, "language": model})


def test_json_has_the_documented_keys(found: Evaluation) -> None:
    result = json.loads(json.dumps(found.located("s3://run/checkpoint", "report.html").to_json()))
    assert result["pairs"] == 24
    assert result["captions"] == 48
    assert (result["checkpoint"], result["report"]) == ("s3://run/checkpoint", "report.html")
    for way in ("image_to_text", "text_to_image", "chance"):
        assert result["retrieval"][way].keys() >= KS
    assert result["reranked"]["best"] == 10
    assert result["mlm"].keys() >= {
        "accuracy",
        "accuracy_other_image",
        "accuracy_text_only",
        "language_stage_text_only",
    }
    assert (
        result["mlm"]["language_stage_text_only"] == result["mlm"]["accuracy_text_only"]
    )  # the language stage has the same weights here
    assert result["reconstruction"]["stage"] == "vision"


def test_metrics_are_flat_numbers_under_the_source(found: Evaluation) -> None:
    metrics = found.metrics()
    assert all(name.startswith("eval/unseen/") and isinstance(value, float) for name, value in metrics.items())
    assert metrics["eval/unseen/i2t_r1"] == pytest.approx(found.retrieval.image_to_text.at[1])  # type: ignore[union-attr]
    assert {"eval/unseen/mlm_accuracy", "eval/unseen/itm_accuracy", "eval/unseen/reranked_t2i_r10"} <= metrics.keys()


def test_similarity_is_the_mean_of_both_heads_cosines(found: Evaluation, model: VLMo) -> None:
    held_out = found.held_out
    row = held_out.tokens[5].ids
    ranked = found.rankings.text_to_image  # type: ignore[union-attr]
    with torch.no_grad():
        image = model({"x": ForwardInput(heads=("itc",), image=held_out.images[ranked.best[5, :1]])})["x"]
        text = model(
            {
                "x": ForwardInput(
                    heads=("itc",), text=torch.tensor([row]), text_keep=torch.ones(1, len(row), dtype=torch.bool)
                )
            }
        )["x"]
    expected = (image["itc"] @ text["itc"].T + image["itc_vl"] @ text["itc_vl"].T) / 2
    torch.testing.assert_close(ranked.score[5, 0], expected[0, 0], atol=1e-6, rtol=1e-5)


def test_metrics_do_not_depend_on_the_batch_size(
    found: Evaluation, model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer
) -> None:
    other = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": 64})})
    again = evaluate(model, tokenizer, other, storage, others={"vision": model, "language": model})
    torch.testing.assert_close(
        found.rankings.image_to_text.score,  # type: ignore[union-attr]
        again.rankings.image_to_text.score,  # type: ignore[union-attr]
        atol=1e-6,
        rtol=1e-5,
    )
    assert found.mlm.own_image.accuracy == again.mlm.own_image.accuracy  # type: ignore[union-attr]
    assert found.itm == again.itm


@pytest.mark.parametrize(
    ("stage", "null"), [("vision", {"retrieval", "reranked", "mlm", "itm"}), ("language", {"retrieval", "itm"})]
)
def test_results_of_untrained_objectives_are_null(
    stage: str, null: set[str], model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer
) -> None:
    result = evaluate(model, tokenizer, config, storage, stage=stage, limit=6).to_json()
    assert all(result[name] is None for name in null)
    if stage == "language":
        assert result["mlm"]["accuracy"] is None
        assert result["mlm"]["accuracy_text_only"] is not None
        assert result["reconstruction"] is None
    else:
        assert result["reconstruction"]["error"] > 0


def test_single_pair_has_no_comparisons(model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer) -> None:
    result = evaluate(model, tokenizer, config, storage, limit=1).to_json()
    assert result["mlm"]["accuracy_other_image"] is None
    assert result["itm"] is None
    assert result["retrieval"]["text_to_image"]["r1"] == result["retrieval"]["chance"]["r1"] == 1.0


def test_dual_encoder_is_evaluated_by_its_single_itc_head(
    config: RunConfig, storage: Storage, tokenizer: Tokenizer
) -> None:
    sizes = {"width": 32, "layers": 1, "text_layers": 1, "heads": 2, "image_size": 32, "patch_size": 8}
    stage = config.stages[-1].model_copy(update={"objectives": {"itc": ObjectiveConfig()}})
    dual = config.model_copy(update={"model": DualEncoderConfig(**sizes, embedding=16), "stages": (stage,)})
    found = evaluate(build_model(dual.model, tokenizer.size, seed=3), tokenizer, dual, storage)
    assert found.rankings is not None
    assert found.rankings.image_to_text.score.abs().max() <= 1 + 1e-5
    result = found.to_json()
    assert result["retrieval"]["image_to_text"].keys() >= KS
    assert all(result[name] is None for name in ("reranked", "itm", "mlm", "reconstruction"))


def test_itm_without_itc_ranks_by_scoring_every_pair(
    model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer
) -> None:
    changes = {"objectives": {"itm": ObjectiveConfig()}, "negatives": "random"}
    stages = (*config.stages[:-1], config.stages[-1].model_copy(update=changes))
    found = evaluate(model, tokenizer, config.model_copy(update={"stages": stages}), storage)
    result, held_out = found.to_json(), found.held_out
    assert result["itm"] is not None
    assert result["reranked"] is None
    assert (result["retrieval"]["by"], result["retrieval"]["images"]) == ("itm", len(held_out))
    pairs = torch.cartesian_prod(torch.arange(len(held_out)), torch.arange(len(held_out.tokens)))
    odds = fusion_scores(model, held_out.images, held_out.token_ids(), tokenizer.pad_id, pairs)
    best = odds.view(len(held_out), -1).topk(10, dim=1).values
    torch.testing.assert_close(found.rankings.image_to_text.score, best)  # type: ignore[union-attr]
    left_out = config.model_copy(update={"stages": stages})
    assert evaluate(model, tokenizer, left_out, storage, rerank_best=0).retrieval is None


def test_fused_retrieval_scores_only_the_first_images_of_many(
    model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"objectives": {"itm": ObjectiveConfig()}, "negatives": "random"}
    stages = (*config.stages[:-1], config.stages[-1].model_copy(update=changes))
    monkeypatch.setattr("pipeline.evaluation.evaluate.RERANK_PAIRS", 30)
    found = evaluate(model, tokenizer, config.model_copy(update={"stages": stages}), storage)
    images = found.retrieval_images
    captions = int((found.held_out.caption_of < images).sum())
    assert 1 < images < len(found.held_out)
    assert images * captions <= 30
    assert found.rankings is None
    assert found.retrieval is not None


def test_unknown_stage_is_rejected_with_the_known_stages(
    model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer
) -> None:
    with pytest.raises(
        ConfigError, match="no stage 'visoin' in this run; its stages: vision, language, vision_language"
    ):
        evaluate(model, tokenizer, config, storage, stage="visoin")
