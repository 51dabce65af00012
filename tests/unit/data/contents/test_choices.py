"""Lists of answers and classes, and the plain form and soft scores of answers as in the VQA evaluation."""

import itertools
import json
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError
from pipeline.data.contents import choices
from pipeline.data.contents.choices import ANSWERS, CLASSES, SCORES, Choices, choices_of, load_choices, plain_answer
from pipeline.data.storage import Storage
from tests.support.fine_tuning_data import COLOURS, run_config, write_set


def test_choices_round_trip_and_malformed_ones_are_rejected_with_their_location() -> None:
    listed = Choices(("ja", "neïn", "2"))
    assert Choices.from_bytes(listed.to_bytes(), "there") == listed
    for content, reason in (
        (b"{}", "expected a JSON list"),
        (b"[]", "expected a JSON list"),
        (b"[1]", "expected a JSON list"),
        (b'["a", "a"]', "'a' is listed more than once"),
        (b"no", "is not JSON"),
    ):
        with pytest.raises(ConfigError, match=f"there.*{reason}"):
            Choices.from_bytes(content, "there")


def test_answers_are_loaded_from_shards_or_from_the_stages_url(tmp_path: Path) -> None:
    config, storage = run_config(tmp_path, "questions", "vqa", 1, num_answers=6), Storage()
    stage = config.stages[0]
    assert load_choices(config, stage, storage, ANSWERS) == Choices((*COLOURS, "yes", "no"))
    (tmp_path / "other.json").write_text(json.dumps(["a", "b"]))
    named = stage.model_copy(update={"answer_list": str(tmp_path / "other.json"), "num_answers": 2})
    assert load_choices(config, named, storage, ANSWERS) == Choices(("a", "b"))
    assert choices_of(config, [named], storage).keys() == {ANSWERS}
    for change, reason in (
        ({"num_answers": 7}, r"num_answers: 7, but .* lists 6"),
        ({"answer_list": str(tmp_path / "nowhere.json")}, r"nowhere.json does not exist; set it"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_choices(config, stage.model_copy(update=change), storage, ANSWERS)


def test_class_names_are_optional_but_must_match(tmp_path: Path) -> None:
    config, storage = run_config(tmp_path, "labelled", "classification", 1, num_classes=4), Storage()
    stage = config.stages[0]
    assert choices_of(config, [stage], storage) == {CLASSES: Choices(COLOURS)}
    with pytest.raises(ConfigError, match="num_classes: 5, but"):
        load_choices(config, stage.model_copy(update={"num_classes": 5}), storage, CLASSES)
    Path(write_set(tmp_path, "labelled", 8), CLASSES).unlink()
    assert load_choices(config, stage, storage, CLASSES) is None


def test_answers_are_compared_and_counted_in_their_plain_form() -> None:
    plain_forms = {
        "A Teddy Bear.": "teddy bear",
        "the  net\n": "net",
        "Two": "2",
        "none": "0",
        "dont know": "don't know",
        "couldnt've": "couldn't've",
        "its": "its",  # a word of its own
        "yes, it is": "yes it is",  # punctuation at the edge of a word is removed
        "black/white": "black white",  # punctuation between words becomes a space
        "1,000": "1000",
        "3.50": "3.50",
        "no.": "no",
        "?": "",
    }
    assert {said: plain_answer(said) for said in plain_forms} == plain_forms
    for said in ("black white", "don't know", "2", "3.50", "teddy bear", "y'all'd've"):
        assert plain_answer(plain_answer(said)) == plain_answer(said)
    assert choices.answer_scores(["Net", "a net", "net.", "mesh", "", "?"]) == {"net": 0.9, "mesh": 0.3}
    chosen = ["no", "yes", "No.", "2", "two", "yes", "red"]
    assert choices.frequent_answers(chosen, min_count=2) == ("no", "yes", "2")
    assert choices.frequent_answers(["yes"] * 9 + ["no"] * 8) == ("yes",)


def test_scores_equal_the_official_vqa_accuracy() -> None:
    """Compute the official rule in full: min(agreeing others / 3, 1), for each nine of the ten people."""
    for count in range(11):
        people = [True] * count + [False] * (10 - count)
        official = sum(min(sum(nine) / 3, 1.0) for nine in itertools.combinations(people, 9)) / 10
        assert SCORES[min(count, 4)] == pytest.approx(official), count
