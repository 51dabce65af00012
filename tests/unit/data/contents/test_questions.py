"""Samples of questions, statements and classes: parsing, faults, and the examples built from them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.building.importers import write_shards
from pipeline.data.contents.members import both_images, class_of, question_of, statement_of, texts_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.quarantine import BadSample
from pipeline.data.reading.samples import iter_captions, iter_samples
from pipeline.data.shards.check import sample_defect
from pipeline.data.shards.tar import TarSample
from pipeline.data.storage import Storage
from tests.support.data_stream import open_loader, take
from tests.support.fine_tuning_data import COLOURS, image_of_sides, run_config


def members(**record: Any) -> dict[str, bytes]:
    return {"jpg": b"", "json": json.dumps(record).encode()}


def test_questions_have_text_scored_answers_and_id() -> None:
    found = question_of(members(question=" why? ", answers={"so": 1, "no": 0.3}, question_id=7))
    assert (found.text, found.answers, found.id) == ("why?", {"so": 1, "no": 0.3}, "7")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "why?"}, "no answers"),
        ({"question": "why?", "answers": {}}, "no answers"),
        ({"question": "why?", "answers": {"so": 1.5}}, "not a number in 0 … 1"),
        ({"question": "why?", "answers": {"so": "1"}}, "not a number in 0 … 1"),
        ({"question": "why?", "answers": {str(n): 0.3 for n in range(11)}}, "11 answers; expected at most 10"),
        ({"question": " ", "answers": {"so": 1}}, "no question"),
        ({"answers": {"so": 1}}, "no question"),
    ],
)
def test_bad_questions_are_reported_with_a_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        question_of(members(**record))


@pytest.mark.parametrize("label", [True, 1, False, 0])
def test_statement_is_true_or_false(label: object) -> None:
    found = statement_of(members(sentence="it is red", label=label, id="dev-1-0-0"))
    assert (found.text, found.is_true, found.id) == ("it is red", bool(label), "dev-1-0-0")


@pytest.mark.parametrize(
    ("record", "reason"),
    [({"sentence": "red"}, "neither true nor false"), ({"sentence": "red", "label": "True"}, "neither true nor false"),
     ({"label": True}, "no sentence")],
)  # fmt: skip
def test_bad_statements_are_reported_with_a_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        statement_of(members(**record))


def test_both_images_are_found_by_number_or_side() -> None:
    assert both_images({"0.jpg": b"a", "1.png": b"b"}) == (b"a", b"b")
    assert both_images({"right.jpg": b"b", "left.webp": b"a"}) == (b"a", b"b")
    with pytest.raises(BadSample, match=r"no image 1.jpg or right.jpg .*; it has 0.jpg"):
        both_images({"0.jpg": b"a"})


def test_class_is_the_number_in_cls_below_num_classes() -> None:
    assert class_of({"cls": b" 3\n"}, 4) == 3
    for content, reason in ((b"cat", "not a class number"), (b"4", "class is 4; expected 0 to 3")):
        with pytest.raises(BadSample, match=reason):
            class_of({"cls": content}, 4)
    with pytest.raises(BadSample, match="no class"):
        class_of({"jpg": b""})


def test_texts_of_every_source_type_are_found() -> None:
    assert texts_of(members(question="why?", answers={})) == ["why?"]
    assert texts_of(members(sentence="it is")) == ["it is"]
    assert texts_of(members(captions=["one"], question="why?")) == ["one"]


OBJECTIVES = {"questions": "vqa", "statements": "nlvr2", "labelled": "classification"}
KEYS: dict[str, dict[str, int]] = {"questions": {"num_answers": 6}, "labelled": {"num_classes": 4}}


def drawn_config(folder: Path, source_type: str) -> RunConfig:
    return run_config(folder, source_type, OBJECTIVES[source_type], 1, **KEYS.get(source_type, {}))


def first_batch(config: RunConfig, rank: int = 0, world_size: int = 1) -> Batch:
    tokenizer = Tokenizer.train([*iter_captions(Storage(), config.sources["train"].shards), "x"], 200)
    return take(config, tokenizer=tokenizer, rank=rank, world_size=world_size)[0]


@pytest.mark.parametrize(("source_type", "other"), [*pairwise(OBJECTIVES), ("labelled", "questions")])
def test_shard_check_agrees_with_training(tmp_path: Path, source_type: str, other: str) -> None:
    config = drawn_config(tmp_path, source_type)
    for sample in list(iter_samples(Storage(), config.sources["test"].shards))[:3]:
        walked = TarSample(sample.key, False, [(name, 0, data) for name, data in sample.members.items()])
        assert sample_defect(walked, source_type, 10**6) is None  # type: ignore[arg-type]
        assert sample_defect(walked, other, 10**6) is not None  # type: ignore[arg-type]


def test_examples_of_questions_have_listed_answers_with_scores(tmp_path: Path) -> None:
    batch = first_batch(drawn_config(tmp_path, "questions"))
    assert batch.answers is not None
    assert batch.answer_scores is not None
    assert batch.label is batch.second_image is None
    given = batch.answers >= 0
    assert given.sum(dim=1).tolist() == [1] * 32  # "dark red" and its like are not listed
    assert batch.answers[given].max() < len(COLOURS)
    assert batch.answer_scores[given].tolist() == [1.0] * 32
    assert batch.answer_scores[~given].tolist() == [0.0] * (32 * 9)


def test_examples_of_statements_have_both_images_and_the_label(tmp_path: Path) -> None:
    batch = first_batch(drawn_config(tmp_path, "statements"))
    assert batch.image is not None
    assert batch.second_image is not None
    assert batch.label is not None
    assert batch.image.shape == batch.second_image.shape == (32, 32, 32, 3)
    assert set(batch.label.tolist()) == {0, 1}
    # One image has red shapes, the other blue ones.
    redness = [
        image.float().mean(dim=(1, 2)) @ torch.tensor([1.0, 0, -1]) for image in (batch.image, batch.second_image)
    ]
    assert (redness[0] != redness[1]).all()


@pytest.mark.parametrize("source_type", OBJECTIVES)
def test_ranks_together_read_the_whole_batch(tmp_path: Path, source_type: str) -> None:
    config = drawn_config(tmp_path, source_type)
    whole, parts = first_batch(config), [first_batch(config, rank, 3) for rank in range(3)]
    for name in ("image", "second_image", "label", "answers", "answer_scores"):
        if (expected := getattr(whole, name)) is not None:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), expected), name


def test_another_list_of_answers_changes_the_digest(tmp_path: Path) -> None:
    config, digests = drawn_config(tmp_path, "questions"), set()
    (tmp_path / "other.json").write_text(json.dumps(["no", *COLOURS, "yes"]))
    other = config.stages[0].model_copy(update={"answer_list": str(tmp_path / "other.json")})
    for stage in (config.stages[0], other):
        with open_loader(config.model_copy(update={"stages": (stage,)})) as loader:
            digests.add(loader.digest)
    assert len(digests) == 2


@pytest.mark.parametrize(("answer", "flipped"), [("up", True), ("left", False)])
def test_images_are_not_mirrored_if_an_answer_names_a_side(tmp_path: Path, answer: str, flipped: bool) -> None:
    """The question does not name a side: 'which side is it on?' alone would allow mirroring."""
    record = {"question": "where is it?", "answers": {answer: 1.0}}
    samples = [{"__key__": f"s{n}", "jpg": image_of_sides(), "json": json.dumps(record).encode()} for n in range(32)]
    config, url = drawn_config(tmp_path, "questions"), str(tmp_path / "sides")
    write_shards(Storage(), samples, url)
    train = config.sources["train"].model_copy(update={"shards": url})
    stage = config.stages[0].model_copy(update={"answer_list": f"{tmp_path}/questions-0/answers.json"})
    image = take(config.model_copy(update={"sources": {"train": train}, "stages": (stage,)}))[0].image
    assert image is not None
    left_is_darker = image[:, :, :8].float().mean(dim=(1, 2, 3)) < image[:, :, -8:].float().mean(dim=(1, 2, 3))
    assert bool(left_is_darker.all()) is not flipped
