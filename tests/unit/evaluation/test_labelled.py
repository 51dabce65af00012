"""Metrics of annotated sources, computed for models whose answers are known."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.load import validate
from pipeline.config.schema import ObjectiveConfig
from pipeline.data.contents.choices import ANSWERS, Choices, load_choices
from pipeline.data.contents.members import Statement
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage
from pipeline.evaluation import labelled
from pipeline.evaluation.datasets import LabelledEvalSet
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.retrieval import Predictor
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
def prepared(drawn):
    """Return a function that gives the run fine-tuned on a source type, its tokenizer, and its test data."""

    def prepared(source_type, limit=None, **keys):
        objective, required = KEYS[source_type]
        config = run_config(drawn, source_type, objective, 1, is_drawn=True, **(required | keys))
        tokenizer = Tokenizer.train([*iter_captions(Storage(), config.sources["test"].shards), "x"], 200)
        return config, tokenizer, LabelledEvalSet(config, Storage(), "test", config.stages[0], tokenizer, limit)

    return prepared


def test_accuracies_of_right_and_wrong_models(prepared):
    """For NLVR2, the colourist predicts "true" where the first image is red: correct half of the time."""
    for limit in (None, 7):
        config, _, source = prepared("questions", limit)
        listed = load_choices(config, config.stages[0], Storage(), ANSWERS)
        right = labelled.evaluate_vqa(model := Colourist(), source, listed)
        assert (right["accuracy"], right["questions"], model.rows) == (1.0, limit or 60, limit or 60)
        wrong = labelled.evaluate_vqa(Colourist(wrong=True), source, listed)
        assert wrong["accuracy"] == 0.0
        assert 0.25 <= wrong["accuracy_without_model"] < 0.6  # the most frequent of four colours
    classified, statements = prepared("labelled")[2], prepared("statements")[2]
    right, wrong = (labelled.evaluate_classification(Colourist(wrong), classified) for wrong in (False, True))
    assert (right, wrong["top1"]) == ({"images": 60, "top1": 1.0, "top5": 1.0, "chance": 0.25}, 0.0)
    result, inverted = (labelled.evaluate_nlvr2(Colourist(wrong), statements) for wrong in (False, True))
    assert result["statements"] == 60
    assert 0.25 < result["accuracy"] < 0.75
    assert result["accuracy"] + inverted["accuracy"] == pytest.approx(1.0)
    assert result["accuracy_without_model"] >= 0.5
    ids = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "test-1-0-0"]
    for names, predicted, expected in (
        (ids, [1, 1, 1, 1], 1.0),
        (ids, [1, 0, 1, 1], 2 / 3),
        ([*ids, "a"], 5 * [1], None),
    ):
        judged = [(best, Statement("", True, name)) for best, name in zip(predicted, names, strict=True)]
        source = SimpleNamespace(map_batches=lambda head, compute, judged=judged: judged)
        assert labelled.evaluate_nlvr2(None, source)["consistency"] == expected


def test_evaluation_reports_the_objective_of_the_stage_and_uses_saved_answers(prepared):
    for source_type, metric in (("questions", "accuracy"), ("labelled", "top1")):
        config, tokenizer, _ = prepared(source_type)
        objective, result = KEYS[source_type][0], evaluate(Colourist(), tokenizer, config, Storage())
        values = result.to_json()
        assert (values["pairs"], values["retrieval"], values["mlm"]) == (0, None, None)
        assert values[objective][metric] == result.metrics()[f"eval/test/{objective}_{metric}"] == 1.0
    config, tokenizer, _ = prepared("questions")
    rotated = {ANSWERS: Choices((*COLOURS[1:], COLOURS[0], "yes", "no"))}
    assert evaluate(Colourist(), tokenizer, config, Storage(), choices=rotated).sections["vqa"]["accuracy"] == 0.0
    config.sources["other"] = prepared("labelled")[0].sources["test"]
    with pytest.raises(ConfigError, match="of type labelled, and stage finetune trains no objective"):
        evaluate(Colourist(), tokenizer, config, Storage(), "other")


def test_trap_09_result_on_training_data_is_marked(prepared):
    """No model is selected by its results, but a result on training shards must not pass for a held-out one."""
    config, tokenizer, _ = prepared("questions")
    assert evaluate(Colourist(), tokenizer, config, Storage()).trained_on == ()
    assert evaluate(Colourist(), tokenizer, config, Storage(), "train").to_json()["trained_on"] == ["finetune"]


def test_bad_samples_are_counted_and_too_many_are_an_error(prepared):
    _, _, source = prepared("labelled", num_classes=2)  # half of the colours are not classes here
    with pytest.raises(DataError, match=r"(\d+) of 60 samples are bad: .*its class is"):
        source.map_batches("classes", lambda batch, labels: labels)
    assert 0 < source.skipped.total() < 60


def test_zero_shot_classifies_by_the_means_of_the_class_names_prompts(prepared, drawn):
    config = prepared("labelled")[0]
    tokenizer = Tokenizer.train([*COLOURS, "a photo of the thing."] * 5, 200)
    model = ColourSpace(tokenizer)
    rows = labelled.embed_classes(Predictor(model, tokenizer, 3), COLOURS, PROMPTS, 16)
    for row, name in zip(rows, COLOURS, strict=True):
        ids = [torch.tensor([tokenizer.encode(prompt.replace("{}", name), 16).ids]) for prompt in PROMPTS]
        vectors = [model({"x": ForwardInput(heads=("itc",), text=text)})["only"]["itc"][0] for text in ids]
        torch.testing.assert_close(row, F.normalize(torch.stack(vectors).mean(dim=0), dim=0), atol=1e-6, rtol=1e-5)
    stage = config.stages[0].model_copy(update={"objectives": {"itc": ObjectiveConfig()}})
    section = config.evaluation.model_copy(update={"prompts": PROMPTS})
    config = config.model_copy(update={"stages": (stage,), "evaluation": section})
    result = evaluate(model, tokenizer, config, Storage(), probe="train")
    values = result.to_json()
    assert values["zero_shot"] == {"images": 60, "top1": 1.0, "top5": 1.0, "chance": 0.25}
    assert (values["linear_probe"]["top1"], values["linear_probe"]["trained_on"]) == (1.0, 200)
    assert values["classification"] is None
    assert {"eval/test/zero_shot_top1", "eval/test/linear_probe_top1"} <= result.metrics().keys()
    names = Path(drawn, "labelled-1", "classes.json")
    names.rename(names.with_suffix(".away"))
    try:
        with pytest.raises(ConfigError, match=r"classes\.json with its class names is missing"):
            evaluate(model, tokenizer, config, Storage())
    finally:
        names.with_suffix(".away").rename(names)
    values = config.model_dump(mode="json")
    values["evaluation"]["prompts"] = ["a photo"]
    with pytest.raises(ConfigError, match=r"evaluation.prompts.*must contain \{\} exactly once"):
        validate(values, "tiny")


def test_the_probe_is_the_minimum_of_its_loss():
    """The gradient, derived by hand in NumPy, is zero at the minimum."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(80, 6)), random.integers(0, 3, 80)
    weight, bias = (part.numpy() for part in labelled.fit_linear_probe(torch.tensor(x), torch.tensor(y), 3, 0.01))
    odds = np.exp(x @ weight + bias)
    errors = odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[y]
    assert np.abs(x.T @ errors / 80 + 0.01 * weight).max() < 1e-5
    assert np.abs(errors.mean(axis=0)).max() < 1e-5
    assert np.abs(weight).max() > 0.1
