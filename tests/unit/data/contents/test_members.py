"""The members of a sample, and the lists of answers and classes: parsed, or rejected with a reason."""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import ConfigError
from pipeline.data.contents import choices, members
from pipeline.data.contents.choices import ANSWERS, CLASSES, SCORES, Choices, choices_of, plain_answer
from pipeline.data.contents.members import Annotation, annotation_of, captions_of, image_id_of, texts_of
from pipeline.data.quarantine import BadSample
from pipeline.data.storage import Storage
from tests.support.fine_tuning_data import COLOURS, run_config, write_set

_check = partial(members.check_members, is_duplicate=False)
_question, _statement = (partial(annotation_of, source_type=kind) for kind in ("questions", "statements"))
_class = partial(annotation_of, source_type="labelled", classes=4)
_right_image = partial(members.image_bytes, prefixes=members.BOTH[1])


def with_json(**record: Any) -> dict[str, bytes]:
    return {"jpg": b"", "json": json.dumps(record).encode()}


def test_captions_questions_statements_classes_and_images_are_read_in_every_layout() -> None:
    for sample, captions in (
        ({"json": b'{"captions": ["one", " two "]}'}, ["one", "two"]),
        ({"json": b'{"captions": ["one"]}', "txt": b"other"}, ["one"]),
        ({"json": b'{"caption": "one", "url": "x"}', "txt": b"one"}, ["one"]),  # img2dataset
        ({"json": b'{"caption": null, "url": "x"}', "txt": b"one\n"}, ["one"]),
        ({"txt": "Straße".encode()}, ["Straße"]),
        ({"txt": b"\xef\xbb\xbfone"}, ["one"]),
    ):
        assert captions_of(sample) == captions
    question = {"question": " why? ", "answers": (answers := {"so": 1, "no": 0.3}), "question_id": 7}
    assert _question(with_json(**question)) == Annotation("why?", answers, id="7")
    for label in (True, 1, False, 0):
        stated = with_json(sentence="it is red", label=label, id="dev-1-0-0")
        assert _statement(stated) == Annotation("it is red", label=int(label), id="dev-1-0-0")
    assert _class({"cls": b" 3\n"}) == Annotation(label=3)
    assert texts_of(with_json(question="why?", answers={})) == ["why?"]
    assert texts_of(with_json(sentence="it is")) == ["it is"]
    assert texts_of(with_json(captions=["one"], question="why?")) == ["one"]
    assert members.image_bytes({"seg.png": b"mask", "webp": b"picture"}) == b"picture"
    for sample in ({"0.jpg": b"a", "1.png": b"b"}, {"right.jpg": b"b", "left.webp": b"a"}):
        assert [members.image_bytes(sample, prefixes) for prefixes in members.BOTH] == [b"a", b"b"]
    _check({"jpg": b"", "json": b"", "npz": b""})


def test_bad_members_are_reported_with_a_reason() -> None:
    answered = ({"question": "why?", "answers": answers} for answers in ({"so": 1.5}, {"so": "1"}))
    for parse, sample, reason in (
        *((captions_of, sample, "no caption") for sample in ({"jpg": b""}, {"json": b"{}"})),
        (captions_of, {"txt": b"  \n"}, "caption 1 of 1 is empty"),
        (captions_of, {"json": b'{"captions": ["one", ""]}'}, "caption 2 of 2 is empty"),
        (captions_of, {"json": b'{"captions": []}'}, "list of captions is empty"),
        *((captions_of, {"json": b'{"captions": %s}' % text}, "not a list of strings") for text in (b"[1]", b'"one"')),
        (captions_of, {"json": b'{"captions": '}, "json cannot be read"),
        (captions_of, {"json": b"[1]"}, "not an object but a list"),
        *((captions_of, bad, "not UTF-8") for bad in ({"txt": b"caf\xe9"}, {"json": b'{"caption": "caf\xe9"}'})),
        (captions_of, {"pkl": b"", "pth": b""}, "it has pkl, pth"),
        *((_question, with_json(question="why?", **answers), "no answers") for answers in ({}, {"answers": {}})),
        *((_question, with_json(**record), "not a number in 0 … 1") for record in answered),
        (_question, with_json(question="why?", answers=dict.fromkeys("abcdefghijk", 0.3)), "11 answers; expected at"),
        *((_question, with_json(answers={"so": 1}, **text), "no question") for text in ({}, {"question": " "})),
        *((_statement, with_json(sentence="red", **label), "neither true nor") for label in ({}, {"label": "True"})),
        (_statement, with_json(label=True), "no sentence"),
        (_class, {"jpg": b""}, "no class"), (_class, {"cls": b"4"}, "class is 4; expected 0 to 3"),
        *((_class, {"cls": text}, "not a class number") for text in (b"cat", b"-1", b"1.5", b"", b"\xc2\xb2", b"1 2")),
        (members.image_bytes, {"seg.png": b"mask"}, r"no image.*it has seg\.png"),
        (_right_image, {"0.jpg": b"a"}, r"no image 1\.jpg or right\.jpg .*; it has 0\.jpg"),
        *((_check, {"jpg": b"", name: b""}, "executes code") for name in ("pkl", "pth", "pickle", "features.pt")),
        (partial(members.check_members, is_duplicate=True), {"jpg": b""}, "occurs twice"),
    ):  # fmt: skip
        with pytest.raises(BadSample, match=reason):
            parse(sample)


def test_equal_images_have_equal_ids() -> None:
    assert image_id_of({"jpg": b"x"}) == image_id_of({"png": b"x", "txt": b"a"}) != image_id_of({"jpg": b"y"})
    named = [image_id_of({"jpg": picture, "json": b'{"image_id": 7}'}) for picture in (b"x", b"y")]
    assert named[0] == named[1] == image_id_of({"jpg": b"z", "json": b'{"image_id": "7"}'})
    assert -(2**63) <= named[0] < 2**63
    assert image_id_of({"npz": b"x"}) == image_id_of({"npz": b"x", "txt": b"a"}) != image_id_of({"npz": b"y"})
    for more in ({"json": b'{"image_id": 3}'}, {"jpg": b"j"}):  # regions identify samples without name and image only
        assert image_id_of(more | {"npz": b"x"}) == image_id_of(more | {"npz": b"y"})


def test_choices_are_loaded_from_shards_or_from_the_stages_url_and_must_match(tmp_path: Path) -> None:
    listed, storage = Choices(("ja", "neïn", "2")), Storage()
    assert Choices.from_bytes(listed.to_bytes(), "there") == listed
    reasons = dict.fromkeys((b"{}", b"[]", b"[1]"), "expected a JSON list") | {b"no": "is not JSON"}
    for content, reason in (reasons | {b'["a", "a"]': "'a' is listed more than once"}).items():
        with pytest.raises(ConfigError, match=f"there.*{reason}"):
            Choices.from_bytes(content, "there")
    config = run_config(tmp_path, "questions", "vqa", 1, num_answers=6)
    stage = config.stages[0]
    assert choices_of(config, [stage], storage) == {ANSWERS: Choices((*COLOURS, "yes", "no"))}
    (tmp_path / "other.json").write_text(json.dumps(["a", "b"]))
    named = stage.model_copy(update={"answer_list": str(tmp_path / "other.json"), "num_answers": 2})
    assert choices_of(config, [stage, named], storage) == {ANSWERS: Choices(("a", "b"))}, "the last stage's"
    for change, reason in (
        ({"num_answers": 7}, r"num_answers: 7, but .* lists 6"),
        ({"answer_list": str(tmp_path / "nowhere.json")}, r"nowhere.json does not exist; set it"),
    ):
        with pytest.raises(ConfigError, match=reason):
            choices_of(config, [stage.model_copy(update=change)], storage)
    config = run_config(tmp_path, "labelled", "classification", 1, num_classes=4)
    stage = config.stages[0]
    assert choices_of(config, [stage], storage) == {CLASSES: Choices(COLOURS)}
    with pytest.raises(ConfigError, match="num_classes: 5, but"):
        choices_of(config, [stage.model_copy(update={"num_classes": 5})], storage)
    Path(write_set(tmp_path, "labelled", 8), CLASSES).unlink()
    assert choices_of(config, [stage], storage) == {}, "names of classes are optional"


def test_answers_are_compared_counted_and_scored_as_in_the_official_evaluation() -> None:
    plain_forms = {
        "A Teddy Bear.": "teddy bear", "the  net\n": "net", "Two": "2", "none": "0", "dont know": "don't know",
        "couldnt've": "couldn't've", "its": "its", "1,000": "1000", "3.50": "3.50", "no.": "no", "?": "",
        "yes, it is": "yes it is",  # punctuation at the edge of a word is removed
        "black/white": "black white",  # punctuation between words becomes a space
    }  # fmt: skip
    assert {said: plain_answer(said) for said in plain_forms} == plain_forms
    for said in ("black white", "don't know", "2", "3.50", "teddy bear", "y'all'd've"):
        assert plain_answer(plain_answer(said)) == plain_answer(said)
    assert choices.answer_scores(["Net", "a net", "net.", "mesh", "", "?"]) == {"net": 0.9, "mesh": 0.3}
    for count in range(11):  # the rule in full: min(agreeing others / 3, 1), for each nine of the ten people
        people = [True] * count + [False] * (10 - count)
        official = sum(min(sum(nine) / 3, 1.0) for nine in itertools.combinations(people, 9)) / 10
        assert SCORES[min(count, 4)] == pytest.approx(official), count
