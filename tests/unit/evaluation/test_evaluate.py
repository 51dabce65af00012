"""The evaluation of a tiny model has the documented JSON, equal for every batch size and number of ranks."""

import json

import pytest
import torch

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import DualEncoderConfig, ObjectiveConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.masked import OWN, TEXT_ONLY
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, rank_batches, run_on_all_ranks
from pipeline.evaluation.retrieval import Predictor
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from tests.support.ranks import run_ranks

KS = {"r1", "r5", "r10"}


def test_json_and_metrics_have_the_documented_keys_and_equal_the_models_outputs(evaluation, model):
    result = json.loads(json.dumps(evaluation.to_json()))
    assert (result["pairs"], result["captions"], result["reranked"]["best"]) == (24, 48, 10)
    assert all(result["retrieval"][part].keys() >= KS for part in ("image_to_text", "text_to_image", "chance"))
    mlm = result["mlm"]
    assert mlm.keys() >= {"accuracy", "accuracy_other_image", "accuracy_text_only", "language_stage_text_only"}
    assert mlm["language_stage_text_only"] == mlm["accuracy_text_only"]  # the language stage has the same weights
    assert result["reconstruction"]["stage"] == "vision"
    metrics = evaluation.metrics()
    assert all(name.startswith("eval/unseen/") and isinstance(value, float) for name, value in metrics.items())
    assert metrics["eval/unseen/i2t_r1"] == pytest.approx(evaluation.retrieval.image_to_text.values["r1"])
    assert {"eval/unseen/mlm_accuracy", "eval/unseen/itm_accuracy", "eval/unseen/reranked_t2i_r10"} <= metrics.keys()

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
    assert evaluation.sections["mlm"] | {"language_stage_text_only": None} == again.sections["mlm"]
    assert evaluation.sections["itm"] == again.sections["itm"]


def test_results_without_training_or_without_a_second_pair_are_null(model, config, storage, tokenizer):
    for stage, null, section, key in (
        ("vision", ["retrieval", "reranked", "mlm", "itm"], "reconstruction", "error"),
        ("language", ["retrieval", "itm", "reconstruction"], "mlm", "accuracy_text_only"),
    ):
        result = evaluate(model, tokenizer, config, storage, stage=stage, limit=6).to_json()
        assert all(result[name] is None for name in null)
        assert result[section][key] is not None
        assert (result["mlm"] or {"accuracy": None})["accuracy"] is None
    result = evaluate(model, tokenizer, config, storage, limit=1).to_json()
    assert result["mlm"]["accuracy_other_image"] is result["itm"] is None
    assert result["retrieval"]["text_to_image"]["r1"] == result["retrieval"]["chance"]["r1"] == 1.0
    known = "no stage 'visoin' in this run; its stages: vision, language, vision_language"
    with pytest.raises(ConfigError, match=known):
        evaluate(model, tokenizer, config, storage, stage="visoin")


def test_dual_encoder_is_evaluated_by_its_single_itc_head(config, storage, tokenizer):
    sizes = {"width": 32, "layers": 1, "text_layers": 1, "heads": 2, "image_size": 32, "patch_size": 8}
    stage = config.stages[-1].model_copy(update={"objectives": {"itc": ObjectiveConfig()}})
    dual = config.model_copy(update={"model": DualEncoderConfig(**sizes, embedding=16), "stages": (stage,)})
    result = evaluate(build_model(dual.model, tokenizer.size, seed=3), tokenizer, dual, storage)
    assert result.rankings.image_to_text.score.abs().max() <= 1 + 1e-5
    values = result.to_json()
    assert values["retrieval"]["image_to_text"].keys() >= KS
    assert all(values[name] is None for name in ("reranked", "itm", "mlm", "reconstruction"))


def test_itm_without_itc_ranks_by_scoring_every_pair_of_the_first_images(
    model, config, storage, tokenizer, monkeypatch
):
    changes = {"objectives": {"itm": ObjectiveConfig()}, "negatives": "random"}
    stages = (*config.stages[:-1], config.stages[-1].model_copy(update=changes))
    config = config.model_copy(update={"stages": stages})
    result = evaluate(model, tokenizer, config, storage)
    held_out = result.held_out
    assert (result.sections["itm"] is None, result.reranked) == (False, None)
    assert (result.retrieval_by, result.retrieval_images) == ("itm", len(held_out))
    pairs = torch.cartesian_prod(torch.arange(len(held_out)), torch.arange(len(held_out.tokens)))
    odds = Predictor(model, tokenizer).fusion_scores(held_out, pairs)
    best = odds.view(len(held_out), -1).topk(10, dim=1).values
    torch.testing.assert_close(result.rankings.image_to_text.score, best)
    assert evaluate(model, tokenizer, config, storage, rerank_best=0).retrieval is None

    monkeypatch.setattr("pipeline.evaluation.evaluate.RERANK_PAIRS", 30)
    part = evaluate(model, tokenizer, config, storage)
    captions = int((part.held_out.caption_of < part.retrieval_images).sum())
    assert 1 < part.retrieval_images < len(part.held_out)
    assert part.retrieval_images * captions <= 30
    assert (part.rankings, part.retrieval is None) == (None, False)


class One(Ranks):
    """One of several ranks, without collective calls."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def shares(self, count):
        return [(r * count // self.world_size, (r + 1) * count // self.world_size) for r in range(self.world_size)]


def test_rows_are_computed_once_with_equal_forward_counts_and_errors_reach_all_ranks(monkeypatch):
    for count, world_size in ((count, size) for count in (1, 7, 50, 64) for size in (1, 2, 9)):
        turns = [list(rank_batches(count, 7, One(rank, world_size))) for rank in range(world_size)]
        own = [row for of_rank in turns for rows, is_own in of_rank if is_own for row in range(count)[rows]]
        assert own == list(range(count))
        assert len({len(of_rank) for of_rank in turns}) == 1
        assert all(0 < rows.stop - rows.start <= 7 for of_rank in turns for rows, _ in of_rank)
    ranks = One(0, 2)
    monkeypatch.setattr(ranks, "gather_objects", lambda value: [value, (None, DataError("shard 3 changed"))])
    with pytest.raises(DataError, match="shard 3 changed"):
        run_on_all_ranks(ranks, lambda: 1)


def evaluated(config, ranks=None):
    """Return all results of one rank: metrics, ranks, best candidates, predictions."""
    from pipeline.training.collectives import Collectives

    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(["a red square", "two blue circles and a green star"], 200)
    model = build_model(config.model, tokenizer.size, HeadConfig("pixels"), seed=3)
    result = evaluate(model, tokenizer, config, Storage(), others={"language": model}, ranks=ranks or Collectives())
    tensors = [tensor for direction in result.rankings for tensor in direction]
    tensors += [result.mlm.predictions[OWN].truth_probability, result.mlm.predictions[TEXT_ONLY].tokens]
    return result.to_json(), result.metrics(), tensors


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_do_not_depend_on_the_number_of_ranks(config, world_size):
    values, metrics, tensors = evaluated(config, SINGLE_PROCESS)
    for own_values, own_metrics, own_tensors in run_ranks(evaluated, world_size, config):
        assert (own_values, own_metrics) == (values, metrics)
        assert all(torch.equal(mine, other) for mine, other in zip(own_tensors, tensors, strict=True))
