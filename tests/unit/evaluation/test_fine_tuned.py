"""Metrics of fine-tuned tasks, computed for models whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import ANSWERS, load_answers
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage
from pipeline.evaluation.classification import evaluate_classification
from pipeline.evaluation.datasets import LabelledEvalSet
from pipeline.evaluation.evaluate import evaluate, stages_trained_on
from pipeline.evaluation.vqa_nlvr2 import consistency, evaluate_nlvr2, evaluate_vqa
from pipeline.models.forward import ForwardInput, ForwardOutput
from tests.support.fine_tuning_data import COLOURS, colour_of, run_config


class Colourist(nn.Module):
    """Model that answers with the colour of an image's darkest pixels, or with the next colour if `wrong`."""

    def __init__(self, heads: dict[str, int], wrong: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.heads, self.wrong, self.rows = heads, wrong, 0

    def forward(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        (one,) = passes.values()
        (head,) = one.heads
        assert one.image is not None
        self.rows += len(one.image)
        if head == "nlvr2":
            # True where the first image is redder than the second.
            assert one.second_image is not None
            redder = _redness(one.image) > _redness(one.second_image)
            logits = nn.functional.one_hot(redder.long() ^ self.wrong, 2).float()
        else:
            logits = nn.functional.one_hot((colour_of(one.image) + self.wrong) % 4, self.heads[head]).float()
        return {"only": {head: logits}}


def _redness(image: torch.Tensor) -> torch.Tensor:
    return image.float().mean(dim=(1, 2)) @ torch.tensor([1.0, 0.0, -1.0])


def source_of(folder: Path, source_type: str, objective: str, limit: int | None = None, **keys: Any) -> LabelledEvalSet:
    config = run_config(folder, source_type, objective, 1, **keys)
    return LabelledEvalSet(config, Storage(), "test", config.stages[0], tokenizer_of(config), limit)


def tokenizer_of(config: RunConfig) -> Tokenizer:
    return Tokenizer.train([*iter_captions(Storage(), config.sources["test"].shards), "x"], 200)


@pytest.mark.parametrize("limit", [None, 7])
def test_vqa_accuracy_is_the_mean_score_of_the_answers_given(tmp_path: Path, limit: int | None) -> None:
    source = source_of(tmp_path, "questions", "vqa", limit, num_answers=6)
    config = run_config(tmp_path, "questions", "vqa", 1, num_answers=6)
    listed = load_answers(config, config.stages[0], Storage())
    assert listed is not None
    right = evaluate_vqa(model := Colourist({"answers": 6}), source, listed)
    assert (right.accuracy, right.questions) == (1.0, limit or 60)
    assert model.rows == right.questions
    wrong = evaluate_vqa(Colourist({"answers": 6}, wrong=True), source, listed)
    assert wrong.accuracy == 0.0
    assert 0.25 <= wrong.accuracy_without_model < 0.6  # the most frequent of four colours


def test_top_1_and_top_5_of_classes(tmp_path: Path) -> None:
    source = source_of(tmp_path, "labelled", "classification", num_classes=4)
    right = evaluate_classification(Colourist({"classes": 4}), source)
    assert (right.top1, right.top5, right.chance, right.images) == (1.0, 1.0, 0.25, 60)
    assert evaluate_classification(Colourist({"classes": 4}, wrong=True), source).top1 == 0.0


def test_nlvr2_accuracy_counts_true_and_false_equally(tmp_path: Path) -> None:
    """The colourist predicts "true" where the first image is red, whatever the sentence: correct half of the time."""
    found = evaluate_nlvr2(Colourist({}), source_of(tmp_path, "statements", "nlvr2"))
    assert found.statements == 60
    assert 0.25 < found.accuracy < 0.75
    other = evaluate_nlvr2(Colourist({}, wrong=True), source_of(tmp_path, "statements", "nlvr2"))
    assert found.accuracy + other.accuracy == pytest.approx(1.0)
    assert found.accuracy_without_model >= 0.5


def test_consistency_counts_sentences_correct_for_every_pair() -> None:
    ids = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "test-1-0-0"]
    assert consistency(ids, [True, True, True, True]) == 1.0
    assert consistency(ids, [True, False, True, True]) == pytest.approx(2 / 3)
    assert consistency([*ids, "mine"], [True] * 5) is None


@pytest.mark.parametrize(
    ("source_type", "objective", "keys"),
    [("questions", "vqa", {"num_answers": 6}), ("labelled", "classification", {"num_classes": 4})],
)
def test_evaluation_reports_the_objective_of_the_stage(
    tmp_path: Path, source_type: str, objective: str, keys: dict[str, int]
) -> None:
    config = run_config(tmp_path, source_type, objective, 1, **keys)
    found = evaluate(Colourist({"answers": 6, "classes": 4}), tokenizer_of(config), config, Storage())
    result = found.to_json()
    assert result["pairs"] == 0
    assert result["retrieval"] is result["mlm"] is None
    figures = result[objective]
    assert figures.get("accuracy", figures.get("top1")) == 1.0
    assert f"eval/test/{objective}_{'accuracy' if objective == 'vqa' else 'top1'}" in found.metrics()


def test_source_type_without_a_trained_objective_is_rejected(tmp_path: Path) -> None:
    config = run_config(tmp_path, "questions", "vqa", 1, num_answers=6)
    other = run_config(tmp_path, "labelled", "classification", 1, num_classes=4)
    config = config.model_copy(update={"sources": {**config.sources, "other": other.sources["test"]}})
    with pytest.raises(ConfigError, match="of type labelled, and stage finetune trains no objective"):
        evaluate(Colourist({}), tokenizer_of(config), config, Storage(), "other")


def test_trap_09_result_on_training_data_is_marked(tmp_path: Path) -> None:
    """No model is selected by its results, but a result on training shards must not pass for a held-out one."""
    config = run_config(tmp_path, "questions", "vqa", 1, num_answers=6)
    model, tokenizer = Colourist({"answers": 6}), tokenizer_of(config)
    assert evaluate(model, tokenizer, config, Storage()).to_json()["trained_on"] == []
    assert evaluate(model, tokenizer, config, Storage(), "train").to_json()["trained_on"] == ["finetune"]
    again = config.sources["train"].model_copy(update={"shards": config.sources["train"].shards + "/"})
    renamed = config.model_copy(update={"sources": {**config.sources, "held_out": again}})
    assert stages_trained_on(renamed, "held_out") == ("finetune",)


def test_bad_samples_are_counted_and_too_many_are_an_error(tmp_path: Path) -> None:
    source = source_of(
        tmp_path, "labelled", "classification", num_classes=2
    )  # half of the colours are not classes here
    with pytest.raises(DataError, match="its class is"):
        source.map_ranks(lambda: len(list(source.batches(torch.device("cpu"), "classes"))))
    assert source.skipped.total() + source.samples == 60


def test_answer_list_saved_with_the_weights_is_used(tmp_path: Path) -> None:
    from pipeline.data.contents.choices import Choices

    config = run_config(tmp_path, "questions", "vqa", 1, num_answers=6)
    turned = Choices((*COLOURS[1:], COLOURS[0], "yes", "no"))
    found = evaluate(Colourist({"answers": 6}), tokenizer_of(config), config, Storage(), choices={ANSWERS: turned})
    assert found.vqa is not None
    assert found.vqa.accuracy == 0.0
