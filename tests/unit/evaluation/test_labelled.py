"""Metrics of annotated sources, computed for models whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.load import validate
from pipeline.config.schema import ObjectiveConfig
from pipeline.data.contents.choices import ANSWERS, Choices, load_choices
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import LabelledEvalSet
from pipeline.evaluation.evaluate import evaluate, stages_trained_on
from pipeline.evaluation.labelled import (
    class_vectors,
    consistency,
    evaluate_classification,
    evaluate_nlvr2,
    evaluate_vqa,
    fit_linear_probe,
)
from pipeline.models.forward import ForwardInput
from tests.support.fine_tuning_data import COLOURS, colour_of, run_config, write_set

KEYS = {
    "questions": ("vqa", {"num_answers": 6}),
    "labelled": ("classification", {"num_classes": 4}),
    "statements": ("nlvr2", {}),
}
HEADS = {"answers": 6, "classes": 4}  # outputs
PROMPTS = ("a photo of a {}.", "the {} thing")


class Colourist(nn.Module):
    """Model that answers with the colour of an image, or with the next colour if `wrong`."""

    def __init__(self, wrong=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.wrong, self.rows = wrong, 0

    def forward(self, forwards):
        (one,) = forwards.values()
        (head,) = one.heads
        self.rows += len(one.image)
        if head == "nlvr2":  # true where the first image is redder than the second
            first, second = (image.float().mean(dim=(1, 2)) for image in (one.image, one.second_image))
            redder = first[:, 0] - first[:, 2] > second[:, 0] - second[:, 2]
            return {"only": {head: F.one_hot(redder.long() ^ self.wrong, 2).float()}}
        return {"only": {head: F.one_hot((colour_of(one.image) + self.wrong) % 4, HEADS[head]).float()}}


class ColourSpace(nn.Module):
    """Model that embeds images and texts by the colour they show or name, with an offset for each text."""

    def __init__(self, tokenizer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ids = [tokenizer.encode(name, 8).ids[1] for name in COLOURS]

    def forward(self, forwards):
        (one,) = forwards.values()
        if one.text is None:
            colour = F.one_hot(colour_of(one.image), 4).float()
            return {"only": {"tokens": colour[:, None].expand(-1, 5, -1), "itc": colour}}
        named = torch.stack([(one.text == number).any(dim=1) for number in self.ids], dim=1).float()
        noise = 0.1 * (one.text.sum(dim=1, keepdim=True) % 7)
        return {"only": {"itc": F.normalize(named + noise, dim=1)}}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Draw training and test data of every source type."""
    folder = tmp_path_factory.mktemp("drawn")
    for source_type in KEYS:
        write_set(folder, source_type, 200)
        write_set(folder, source_type, 60, seed=1)
    return folder


@pytest.fixture
def run_of(drawn):
    """Return a function that gives the run fine-tuned on a source type."""

    def run_of(source_type, **keys):
        objective, required = KEYS[source_type]
        return run_config(drawn, source_type, objective, 1, is_drawn=True, **(required | keys))

    return run_of


@pytest.fixture
def source_of(run_of):
    def source_of(source_type, limit=None, **keys):
        config = run_of(source_type, **keys)
        return LabelledEvalSet(config, Storage(), "test", config.stages[0], tokenizer_of(config), limit)

    return source_of


def tokenizer_of(config):
    return Tokenizer.train([*iter_captions(Storage(), config.sources["test"].shards), "x"], 200)


@pytest.mark.parametrize("limit", [None, 7])
def test_vqa_accuracy_is_the_mean_score_of_the_answers_given(limit, run_of, source_of):
    config, source = run_of("questions"), source_of("questions", limit)
    listed = load_choices(config, config.stages[0], Storage(), ANSWERS)
    right = evaluate_vqa(model := Colourist(), source, listed)
    assert (right.accuracy, right.questions, model.rows) == (1.0, limit or 60, limit or 60)
    wrong = evaluate_vqa(Colourist(wrong=True), source, listed)
    assert wrong.accuracy == 0.0
    assert 0.25 <= wrong.accuracy_without_model < 0.6  # the most frequent of four colours


def test_top_1_and_top_5_of_classes(source_of):
    right, wrong = (evaluate_classification(Colourist(wrong), source_of("labelled")) for wrong in (False, True))
    assert (right.top1, right.top5, right.chance, right.images) == (1.0, 1.0, 0.25, 60)
    assert wrong.top1 == 0.0


def test_nlvr2_accuracy_counts_true_and_false_equally(source_of):
    """The colourist predicts "true" where the first image is red, whatever the sentence: correct half of the time."""
    result, inverted = (evaluate_nlvr2(Colourist(wrong), source_of("statements")) for wrong in (False, True))
    assert result.statements == 60
    assert 0.25 < result.accuracy < 0.75
    assert result.accuracy + inverted.accuracy == pytest.approx(1.0)
    assert result.accuracy_without_model >= 0.5


def test_consistency_counts_sentences_correct_for_every_pair():
    ids = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "test-1-0-0"]
    assert consistency(ids, [True, True, True, True]) == 1.0
    assert consistency(ids, [True, False, True, True]) == pytest.approx(2 / 3)
    assert consistency([*ids, "mine"], [True] * 5) is None


@pytest.mark.parametrize(("source_type", "metric"), [("questions", "accuracy"), ("labelled", "top1")])
def test_evaluation_reports_the_objective_of_the_stage(source_type, metric, run_of):
    config, objective = run_of(source_type), KEYS[source_type][0]
    result = evaluate(Colourist(), tokenizer_of(config), config, Storage())
    values = result.to_json()
    assert (values["pairs"], values["retrieval"], values["mlm"]) == (0, None, None)
    assert values[objective][metric] == 1.0
    assert f"eval/test/{objective}_{metric}" in result.metrics()


def test_source_type_without_a_trained_objective_is_rejected(run_of):
    config = run_of("questions")
    config.sources["other"] = run_of("labelled").sources["test"]
    with pytest.raises(ConfigError, match="of type labelled, and stage finetune trains no objective"):
        evaluate(Colourist(), tokenizer_of(config), config, Storage(), "other")


def test_trap_09_result_on_training_data_is_marked(run_of):
    """No model is selected by its results, but a result on training shards must not pass for a held-out one."""
    config = run_of("questions")
    model, tokenizer = Colourist(), tokenizer_of(config)
    assert evaluate(model, tokenizer, config, Storage()).trained_on == ()
    assert evaluate(model, tokenizer, config, Storage(), "train").to_json()["trained_on"] == ["finetune"]
    train = config.sources["train"]
    config.sources["renamed"] = train.model_copy(update={"shards": train.shards + "/"})
    assert stages_trained_on(config, "renamed") == ("finetune",)


def test_bad_samples_are_counted_and_too_many_are_an_error(source_of):
    source = source_of("labelled", num_classes=2)  # half of the colours are not classes here
    with pytest.raises(DataError, match="its class is"):
        source.map_ranks(lambda: len(list(source.batches("classes"))))
    assert source.skipped.total() + source.samples == 60


def test_answer_list_saved_with_the_weights_is_used(run_of):
    config = run_of("questions")
    rotated = {ANSWERS: Choices((*COLOURS[1:], COLOURS[0], "yes", "no"))}
    assert evaluate(Colourist(), tokenizer_of(config), config, Storage(), choices=rotated).vqa.accuracy == 0.0


@pytest.fixture(scope="module")
def colour_tokenizer():
    return Tokenizer.train([*COLOURS, "a photo of the thing."] * 5, 200)


def test_class_embedding_is_the_mean_of_its_prompts(colour_tokenizer):
    model = ColourSpace(colour_tokenizer)
    vectors = class_vectors(model, colour_tokenizer, COLOURS, PROMPTS, 16, batch=3)
    for row, name in zip(vectors, COLOURS, strict=True):
        texts = [prompt.replace("{}", name) for prompt in PROMPTS]
        ids = [torch.tensor([colour_tokenizer.encode(text, 16).ids]) for text in texts]
        each = [model({"x": ForwardInput(heads=("itc",), text=text)})["only"]["itc"][0] for text in ids]
        mean = torch.stack(each).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_zero_shot_classifies_by_class_names(run_of, drawn, colour_tokenizer):
    config = run_of("labelled")
    stage = config.stages[0].model_copy(update={"objectives": {"itc": ObjectiveConfig()}})
    section = config.evaluation.model_copy(update={"prompts": PROMPTS})
    config = config.model_copy(update={"stages": (stage,), "evaluation": section})
    model = ColourSpace(colour_tokenizer)
    result = evaluate(model, colour_tokenizer, config, Storage(), probe="train")
    values = result.to_json()
    assert values["zero_shot"] == {"images": 60, "top1": 1.0, "top5": 1.0, "chance": 0.25}
    assert (values["linear_probe"]["top1"], values["linear_probe"]["trained_on"]) == (1.0, 200)
    assert values["classification"] is None
    assert {"eval/test/zero_shot_top1", "eval/test/linear_probe_top1"} <= result.metrics().keys()
    names = Path(drawn, "labelled-1", "classes.json")
    names.rename(names.with_suffix(".away"))
    try:
        with pytest.raises(ConfigError, match=r"classes\.json with its class names is missing"):
            evaluate(model, colour_tokenizer, config, Storage())
    finally:
        names.with_suffix(".away").rename(names)


def test_the_probe_is_the_minimum_of_its_loss():
    """The gradient, derived by hand in NumPy, is zero at the minimum."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(80, 6)), random.integers(0, 3, 80)
    penalty = 0.01
    weight, bias = (part.numpy() for part in fit_linear_probe(torch.tensor(x), torch.tensor(y), 3, penalty))
    odds = np.exp(x @ weight + bias)
    errors = odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[y]
    assert np.abs(x.T @ errors / 80 + penalty * weight).max() < 1e-5
    assert np.abs(errors.mean(axis=0)).max() < 1e-5
    assert np.abs(weight).max() > 0.1


def test_prompt_requires_a_placeholder_for_the_name(run_of):
    values = run_of("labelled").model_dump(mode="json")
    values["evaluation"]["prompts"] = ["a photo"]
    with pytest.raises(ConfigError, match=r"evaluation.prompts.*must contain \{\} exactly once"):
        validate(values, "tiny")
