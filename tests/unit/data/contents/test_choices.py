"""Lists of answers and classes: read from beside the shards, checked against the config, told by name when wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices, choices_of, load_answers, load_classes
from pipeline.data.storage import Storage
from tests.support.fine_tuning_data import COLOURS, run_config, write_set


def test_a_list_reads_back_and_numbers_only_what_it_lists() -> None:
    choices = Choices(("ja", "neïn", "2"))
    again = Choices.from_bytes(choices.to_bytes(), "there")
    assert again == choices
    assert again.digest == choices.digest
    assert again.numbered({"2": 0.3, "unlisted": 1.0, "ja": 0.6}) == {2: 0.3, 0: 0.6}


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"{}", "expected a JSON list"), (b"[]", "expected a JSON list"), (b"[1]", "expected a JSON list"),
     (b'["a", "a"]', "'a' is listed more than once"), (b"no", "is not JSON")],
)  # fmt: skip
def test_what_is_no_list_of_texts_is_refused_with_its_place(content: bytes, told: str) -> None:
    with pytest.raises(ConfigError, match=f"there.*{told}"):
        Choices.from_bytes(content, "there")


def test_answers_are_found_beside_the_shards_or_where_the_stage_says(tmp_path: Path) -> None:
    config, storage = run_config(tmp_path, "questions", "vqa", 1, num_answers=6), Storage()
    assert load_answers(config, config.stages[0], storage) == Choices((*COLOURS, "yes", "no"))
    (tmp_path / "other.json").write_text(json.dumps(["a", "b"]))
    named = config.stages[0].model_copy(update={"answer_list": str(tmp_path / "other.json"), "num_answers": 2})
    assert load_answers(config, named, storage) == Choices(("a", "b"))
    assert choices_of(config, [named], storage).keys() == {ANSWERS}


def test_a_list_of_another_length_or_none_at_all_is_told_with_what_to_set(tmp_path: Path) -> None:
    config, storage = run_config(tmp_path, "questions", "vqa", 1, num_answers=7), Storage()
    with pytest.raises(ConfigError, match=r"num_answers: 7, but .* lists 6"):
        load_answers(config, config.stages[0], storage)
    gone = config.stages[0].model_copy(update={"answer_list": str(tmp_path / "nowhere.json")})
    with pytest.raises(ConfigError, match=r"nowhere.json does not exist; set it"):
        load_answers(config, gone, storage)


def test_classes_need_no_names_but_those_there_are_must_fit(tmp_path: Path) -> None:
    config, storage = run_config(tmp_path, "labelled", "classification", 1, num_classes=4), Storage()
    stage = config.stages[0]
    assert choices_of(config, [stage], storage) == {CLASSES: Choices(COLOURS)}
    with pytest.raises(ConfigError, match="num_classes: 5, but"):
        load_classes(config, stage.model_copy(update={"num_classes": 5}), storage)
    Path(write_set(tmp_path, "labelled", 8), CLASSES).unlink()
    assert load_classes(config, stage, storage) is None
