"""Samples of questions, statements and classes: parsing, faults, and the examples built from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.batch import Batch
from pipeline.data.building.importers import write_shards
from pipeline.data.contents.choices import ANSWERS, load_choices
from pipeline.data.contents.members import class_of, texts_of
from pipeline.data.contents.questions import both_images, question_of, statement_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import Loader
from pipeline.data.quarantine import BadSample
from pipeline.data.reading.samples import iter_captions, iter_samples
from pipeline.data.shards.check import sample_defect
from pipeline.data.shards.tar import TarSample
from pipeline.data.storage import Storage
from pipeline.objectives import batch_groups
from tests.support.fine_tuning_data import COLOURS, run_config


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


def test_shard_check_agrees_with_training_for_every_type(tmp_path: Path) -> None:
    for source_type, other in (("questions", "statements"), ("statements", "questions"), ("labelled", "questions")):
        config = run_config(tmp_path, source_type, _OBJECTIVES[source_type], 1, **_KEYS[source_type])
        for sample in list(iter_samples(Storage(), config.sources["test"].shards))[:3]:
            walked = TarSample(sample.key, False, [(name, 0, data) for name, data in sample.members.items()])
            assert sample_defect(walked, source_type, 10**6) is None  # type: ignore[arg-type]
            assert sample_defect(walked, other, 10**6) is not None  # type: ignore[arg-type]


_OBJECTIVES = {"questions": "vqa", "statements": "nlvr2", "labelled": "classification"}
_KEYS: dict[str, dict[str, int]] = {"questions": {"num_answers": 6}, "statements": {}, "labelled": {"num_classes": 4}}


def first_batch(folder: Path, source_type: str, rank: int = 0, world_size: int = 1) -> Batch:
    config, storage = run_config(folder, source_type, _OBJECTIVES[source_type], 1, **_KEYS[source_type]), Storage()
    tokenizer = Tokenizer.train([*iter_captions(storage, config.sources["train"].shards), "x"], 200)
    with Loader(
        config, config.stages[0], batch_groups(config, config.stages[0]), storage, tokenizer, rank, world_size
    ) as loader:
        return next(loader.batches(0))


def test_examples_of_questions_have_listed_answers_with_scores(tmp_path: Path) -> None:
    batch = first_batch(tmp_path, "questions")
    assert batch.text is not None
    assert batch.answers is not None
    assert batch.answer_scores is not None
    assert batch.label is batch.second_image is None
    given = batch.answers >= 0
    assert given.sum(dim=1).tolist() == [1] * 32  # "dark red" and its like are not listed
    assert batch.answers[given].max() < len(COLOURS)
    assert batch.answer_scores[given].tolist() == [1.0] * 32
    assert batch.answer_scores[~given].tolist() == [0.0] * (32 * 9)


def test_examples_of_statements_have_both_images_and_the_label(tmp_path: Path) -> None:
    batch = first_batch(tmp_path, "statements")
    assert batch.image is not None
    assert batch.second_image is not None
    assert batch.label is not None
    assert batch.image.shape == batch.second_image.shape == (32, 32, 32, 3)
    assert set(batch.label.tolist()) == {0, 1}
    # One image has red shapes, the other blue ones: if the first is redder, the second is bluer.
    redness = [
        (each.float().mean(dim=(1, 2)) @ torch.tensor([1.0, 0, -1])).numpy()
        for each in (batch.image, batch.second_image)
    ]
    assert (np.sign(redness[0] - redness[1]) != 0).all()


def test_ranks_together_read_the_whole_batch(tmp_path: Path) -> None:
    for source_type in _OBJECTIVES:
        whole = first_batch(tmp_path, source_type)
        parts = [first_batch(tmp_path, source_type, rank, 3) for rank in range(3)]
        for name in ("image", "second_image", "label", "answers", "answer_scores"):
            if (expected := getattr(whole, name)) is not None:
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), expected), (source_type, name)


def test_another_list_of_answers_changes_the_digest(tmp_path: Path) -> None:
    config, storage = run_config(tmp_path, "questions", "vqa", 1, num_answers=6), Storage()
    (tmp_path / "other.json").write_text(json.dumps(["no", *COLOURS, "yes"]))
    other = config.stages[0].model_copy(update={"answer_list": str(tmp_path / "other.json")})
    digests = set()
    for stage in (config.stages[0], other):
        with Loader(config, stage, batch_groups(config, stage), storage, Tokenizer.train(["x y"], 64), 0, 1) as loader:
            digests.add(loader.digest)
    assert len(digests) == 2


@pytest.mark.parametrize(("answer", "flipped"), [("up", True), ("left", False)])
def test_images_are_not_mirrored_if_an_answer_names_a_side(tmp_path: Path, answer: str, flipped: bool) -> None:
    """The question does not name a side: 'which side is it on?' alone would allow mirroring."""
    from tests.support.fine_tuning_data import picture_of_sides

    record = {"question": "where is it?", "answers": {answer: 1.0}}
    samples = [{"__key__": f"s{n}", "jpg": picture_of_sides(), "json": json.dumps(record).encode()} for n in range(32)]
    config, storage = run_config(tmp_path, "questions", "vqa", 1, num_answers=6), Storage()
    url = str(tmp_path / "sides")
    write_shards(storage, samples, url)
    config = config.model_copy(
        update={"sources": {"train": config.sources["train"].model_copy(update={"shards": url})}}
    )
    stage = config.stages[0].model_copy(update={"answer_list": f"{tmp_path}/questions-0/answers.json"})
    assert load_choices(config, stage, storage, ANSWERS) is not None
    with Loader(
        config, stage, batch_groups(config, stage), storage, Tokenizer.train(["where is it"], 64), 0, 1
    ) as loader:
        image = next(loader.batches(0)).image
    assert image is not None
    left_is_darker = image[:, :, :8].float().mean(dim=(1, 2, 3)) < image[:, :, -8:].float().mean(dim=(1, 2, 3))
    assert bool(left_is_darker.all()) is not flipped
