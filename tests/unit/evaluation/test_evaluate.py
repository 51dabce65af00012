"""The evaluation of a tiny model has the documented JSON and page, equal for every batch size and number of ranks."""

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import DualEncoderConfig, ObjectiveConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.explain import alignment_examples
from pipeline.evaluation.masked import OWN, TEXT_ONLY
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, gathered, rank_batches
from pipeline.evaluation.report import Alignments, build_report_data, render_report
from pipeline.evaluation.retrieval import Predictor, rankings
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.pages.charts import percent
from pipeline.pages.page import thumbnail
from tests.support.ranks import run_ranks

KS = {"r1", "r5", "r10"}
CURVES = {"vision": [(step, 2.0 / (step + 1)) for step in range(50)], "language": []}


def test_json_and_metrics_have_the_documented_keys_and_equal_the_models_outputs_for_every_batch_size(
    evaluation, model, config, tokenizer
):
    result = json.loads(json.dumps(evaluation.to_json()))
    mlm = result["mlm"]
    assert (result["pairs"], result["captions"], result["reranked"]["best"]) == (24, 48, 10)
    assert all(result["retrieval"][part].keys() >= KS for part in ("image_to_text", "text_to_image", "chance"))
    assert mlm.keys() >= {"accuracy", "accuracy_other_image", "accuracy_text_only", "language_stage_text_only"}
    assert mlm["language_stage_text_only"] == mlm["accuracy_text_only"]  # the language stage has the same weights
    assert result["reconstruction"]["stage"] == "vision"
    metrics = evaluation.metrics()
    assert all(name.startswith("eval/unseen/") and isinstance(value, float) for name, value in metrics.items())
    assert metrics["eval/unseen/i2t_r1"] == evaluation.retrieval.image_to_text.values["r1"]
    assert {"eval/unseen/mlm_accuracy", "eval/unseen/itm_accuracy", "eval/unseen/reranked_t2i_r10"} <= metrics.keys()
    held_out, ranked = evaluation.held_out, evaluation.rankings.text_to_image
    image = ForwardInput(heads=("itc",), image=held_out.images[ranked.best[5, :1]])
    text = ForwardInput(heads=("itc",), text=torch.tensor([held_out.tokens[5].ids]))
    with torch.no_grad():
        of_image, of_text = model({"x": image})["x"], model({"x": text})["x"]
    expected = sum(of_image[head] @ of_text[head].T for head in ("itc", "itc_vl")) / 2
    torch.testing.assert_close(ranked.score[5, 0], expected[0, 0], atol=1e-6, rtol=1e-5)
    other = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": 64})})
    again = evaluate(model, tokenizer, other, Storage())  # nothing depends on the batch size
    scores = (result.rankings.image_to_text.score for result in (evaluation, again))
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-5)
    assert evaluation.sections["mlm"] | {"language_stage_text_only": None} == again.sections["mlm"]
    assert evaluation.sections["itm"] == again.sections["itm"]


def test_results_without_training_or_without_a_second_pair_are_null_and_have_a_page(model, config, tokenizer):
    vision = ["retrieval", "reranked", "mlm", "itm"], "reconstruction", "error"
    language = ["retrieval", "itm", "reconstruction"], "mlm", "accuracy_text_only"
    last = ["itm"], "retrieval", "chance"
    for stage, limit, (null, section, key) in (
        ("vision", 1, vision), ("vision", 6, vision), ("language", 6, language), ("vision_language", 1, last),
    ):  # fmt: skip
        evaluation = evaluate(model, tokenizer, config, Storage(), stage=stage, limit=limit)
        result = evaluation.to_json()
        assert ([name for name in null if result[name] is not None], result[section][key] is None) == ([], False)
        assert (result["mlm"] or {"accuracy": None})["accuracy"] is None or stage == "vision_language"
        page = render_report(build_report_data(evaluation, config, tokenizer), config, CURVES)
        assert (f"{limit} held-out images" in page, "R@1" in page) == (True, stage == "vision_language")
    assert result["mlm"]["accuracy_other_image"] is None
    assert result["retrieval"]["text_to_image"]["r1"] == result["retrieval"]["chance"]["r1"] == 1.0
    with pytest.raises(ConfigError, match="no stage 'visoin' in this run; its stages: vision, language, vision_lang"):
        evaluate(model, tokenizer, config, Storage(), stage="visoin")
    sizes = {"width": 32, "layers": 1, "text_layers": 1, "heads": 2, "image_size": 32, "patch_size": 8}
    stage = config.stages[-1].model_copy(update={"objectives": {"itc": ObjectiveConfig()}})
    dual = config.model_copy(update={"model": DualEncoderConfig(**sizes, embedding=16), "stages": (stage,)})
    result = evaluate(build_model(dual.model, tokenizer.size, seed=3), tokenizer, dual, Storage())
    assert result.rankings.image_to_text.score.abs().max() <= 1 + 1e-5  # a dual encoder has a single itc head
    assert result.to_json()["retrieval"]["image_to_text"].keys() >= KS
    assert all(result.to_json()[name] is None for name in ("reranked", "itm", "mlm", "reconstruction"))


def test_itm_without_itc_ranks_by_scoring_every_pair_of_the_first_images(model, config, tokenizer, monkeypatch):
    changes = {"objectives": {"itm": ObjectiveConfig()}, "negatives": "random"}
    stages = (*config.stages[:-1], config.stages[-1].model_copy(update=changes))
    config = config.model_copy(update={"stages": stages})
    result = evaluate(model, tokenizer, config, Storage())
    held_out = result.held_out
    assert (result.sections["itm"] is None, result.reranked) == (False, None)
    assert (result.retrieval_by, result.retrieval_images) == ("itm", len(held_out))
    pairs = torch.cartesian_prod(torch.arange(len(held_out)), torch.arange(len(held_out.tokens)))
    odds = Predictor(model, tokenizer).fusion_scores(held_out, pairs)
    best = odds.view(len(held_out), -1).topk(10, dim=1).values
    torch.testing.assert_close(result.rankings.image_to_text.score, best)
    assert evaluate(model, tokenizer, config, Storage(), rerank_best=0).retrieval is None
    monkeypatch.setattr("pipeline.evaluation.evaluate.RERANK_PAIRS", 30)
    part = evaluate(model, tokenizer, config, Storage())
    captions = int((part.held_out.caption_of < part.retrieval_images).sum())
    assert 1 < part.retrieval_images < len(part.held_out)
    assert part.retrieval_images * captions <= 30
    assert (part.rankings, part.retrieval is None) == (None, False)


def test_rows_are_computed_once_with_equal_forward_counts_and_errors_reach_all_ranks(monkeypatch):
    for count, world_size in itertools.product((1, 7, 50, 64), (1, 2, 9)):
        all_ranks = [Ranks() for _ in range(world_size)]
        for rank, ranks in enumerate(all_ranks):
            ranks.rank, ranks.world_size = rank, world_size
        turns = [list(rank_batches(count, 7, ranks)) for ranks in all_ranks]
        own = [row for of_rank in turns for rows, is_own in of_rank if is_own for row in range(count)[rows]]
        assert (own, len({len(of_rank) for of_rank in turns})) == (list(range(count)), 1)
        assert all(0 < rows.stop - rows.start <= 7 for of_rank in turns for rows, _ in of_rank)
    monkeypatch.setattr(ranks, "gather_objects", lambda value: [value, ([], DataError("shard 3 changed"))])
    with pytest.raises(DataError, match="shard 3 changed"), gathered(ranks) as items:
        items.append(1)


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


def test_results_do_not_depend_on_the_number_of_ranks(config):
    values, metrics, tensors = evaluated(config, SINGLE_PROCESS)
    for *own, own_tensors in run_ranks(evaluated, 2, config) + run_ranks(evaluated, 3, config):
        assert own == [values, metrics]
        assert all(torch.equal(*pair) for pair in zip(own_tensors, tensors, strict=True))


def test_pages_show_metrics_with_chance_and_perfect_retrievals(evaluation, config, tokenizer):
    data, held_out = build_report_data(evaluation, config, tokenizer), evaluation.held_out
    page = render_report(replace(data, checkpoint="s3://bucket/run"), config, CURVES)
    of_images, of_texts = evaluation.retrieval
    chance, accuracy = percent(of_texts.chance["r10"]), percent(evaluation.sections["mlm"]["accuracy"])
    shown = [percent(of_images.values["r10"]), f"chance {chance}", accuracy, "s3://bucket/run", "vision_language"]
    assert [text for text in shown if text not in page] == []
    assert page.count("<img") > 30
    perfect = (torch.arange(len(held_out))[:, None] == held_out.caption_of[None]).float()
    ranked = rankings(perfect.__getitem__, perfect.T.__getitem__, held_out.caption_of, held_out.image_id)
    page = render_report(build_report_data(replace(evaluation, rankings=ranked), config, tokenizer), config, CURVES)
    assert (page.count("found first"), len(re.findall(r"right (caption|image) at place", page))) == (16, 0)


def test_alignments_are_shown_comparisons_mark_different_data_and_images_are_reduced(
    model, evaluation, config, tokenizer
):
    torch.manual_seed(0)
    assert len(thumbnail(torch.randint(0, 256, (640, 640, 3), dtype=torch.uint8))) < 40_000
    assert thumbnail(torch.zeros(48, 48, 3, dtype=torch.uint8)).startswith("data:image/png")
    texts = [percent(fraction) for fraction in (0.0, 0.005, 0.125, 1.0, None)]
    assert " ".join(texts).replace("\N{NO-BREAK SPACE}", "") == "0.0% 0.50% 12.5% 100.0% –"
    shown = evaluation.held_out, config, config.stages[-1]
    assert alignment_examples(model, tokenizer, *shown) == Alignments(), "no stage trained to align"
    objectives = {**config.stages[-1].objectives, "wpa": ObjectiveConfig()}
    last = config.stages[-1].model_copy(update={"objectives": objectives})
    config = config.model_copy(update={"stages": (*config.stages[:-1], last)})
    alignments = alignment_examples(model, tokenizer, evaluation.held_out, config, last)
    captions = [evaluation.held_out.captions[number][0] for number in range(0, 24, 6)]
    assert [card.caption for card in alignments.captions] == captions
    assert [word for word, _, _ in alignments.captions[0].words] == captions[0].split()
    assert all(0 < fraction <= 1 for card in alignments.captions for _, _, fraction in card.words)
    data = build_report_data(evaluation, config, tokenizer, alignments)
    page = render_report(data, config, {})
    assert "No stage trained wpa" not in page
    assert page.count('alt="heat map of') == sum(len(card.words) for card in alignments.captions)
    data = replace(data, metrics={"i2t_r1": 0.5, "pairs": 24.0, "mlm_accuracy": 0.25})
    other = replace(data, run="other", metrics={"i2t_r1": 2.0, "pairs": 24.0})
    page = render_report(data, config, {}, other)
    assert '<tr><th scope="row">i2t_r1</th><td>0.5</td><td>2</td><td>-1.5</td></tr>' in page
    assert not any(text in page for text in (">pairs<", "cannot be compared"))
    different = replace(other, key=replace(data.key, digest="another"))
    assert "cannot be compared" in render_report(data, config, {}, different)
