"""Untrusted input files: other encodings, cyclic links, odd suffixes, lists with paths outside their folder."""

import io
import json
import os
import random
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from PIL import Image

from pipeline.config.errors import DataError, MomeError
from pipeline.data.building import inputs
from pipeline.data.building.importers import find_kind
from pipeline.data.building.inputs import Problems
from pipeline.data.contents.images import FORMATS
from pipeline.data.contents.members import captions_of
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.imports import captions_in, members_of, read, record_of, save_image, write_lines

TEXT = "un café, 東京"
READ = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


def test_files_are_read_in_every_marked_encoding(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": TEXT}]}
    contents = {"a.txt": TEXT, "lines.jsonl": {"image": "a.jpg", "caption": TEXT}, "coco.json": coco}
    for encoding in READ:
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (tmp_path / name).write_text(text, encoding)
        assert captions_in(read(tmp_path).samples) == [[TEXT]]
        assert [sample["txt"].decode() for sample in read(tmp_path / "a.txt").samples] == [TEXT]
        for name, kind in (("lines.jsonl", "jsonl"), ("coco.json", "coco")):
            assert find_kind(tmp_path / name) == kind
            assert captions_in(read(tmp_path / name).samples) == [[TEXT]]


@pytest.mark.parametrize(("encoding", "reason"), [("latin-1", "not UTF-8"), ("utf-16-le", "NUL")])
def test_text_of_unknown_encoding_is_skipped_and_counted(tmp_path: Path, encoding: str, reason: str) -> None:
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.jpg", ord(name))
    (tmp_path / "a.txt").write_bytes("un café".encode(encoding))
    (tmp_path / "b.txt").write_text("fine")
    assert captions_in(read(tmp_path, problems := Problems()).samples) == [["fine"]]
    assert (problems.count, reason in problems.first[0]) == (1, True)
    line = json.dumps({"image": "a.jpg", "caption": "un café"}, ensure_ascii=False)
    (tmp_path / "lines.jsonl").write_bytes(b'{"image": "b.jpg", "caption": "fine"}\n' + (line + "\n").encode(encoding))
    assert captions_in(read(tmp_path / "lines.jsonl", problems := Problems()).samples) == [["fine"]]
    assert "line 2" in problems.first[0]
    (tmp_path / "prose.txt").write_bytes(b"First.\n\n" + "un café".encode(encoding) + b"\n\nLast.\n")
    samples = read(tmp_path / "prose.txt", problems := Problems()).samples
    texts = [sample["txt"].decode() for sample in samples]
    assert "First." in texts
    assert not any(bad in text for text in texts for bad in "\ufffd\0")
    assert problems.count >= 1


def test_damaged_file_in_utf16_is_named(tmp_path: Path) -> None:
    for suffix, damage in product(("json", "jsonl", "csv", "txt"), (b"\x00\xd8a\0", b"\0")):  # half a character or unit
        source = tmp_path / f"a.{suffix}"
        source.write_bytes('\ufeff{"image": "a.jpg"}, '.encode("utf-16-le") + damage)
        with pytest.raises(DataError, match=rf"a\.{suffix}.*UTF-8"):
            list(read(source, Problems()).samples)


UNUSABLE = {  # line -> reason
    '{"image": "", "caption": "a"}': "expected",
    '{"image": " ", "caption": "a"}': "expected",
    '{"image": null, "caption": "a"}': "expected",
    '{"image": ["a.jpg"], "caption": "a"}': "expected",
    '{"captions": ["a"]}': "expected",
    '{"image": "a.jpg", "regions": 5, "caption": "a"}': "expected",
    "null": "expected",
    "[1, 2]": "expected",
    '{"image": "a.jpg\\u0000", "caption": "a"}': "not a file path",
    '{"image": "a\\ud83d.jpg", "caption": "b"}': "not a file path",
    '{"image": "' + "a" * 5000 + '.jpg", "caption": "a"}': "cannot be read",
    '{"image": ".", "caption": "a"}': "cannot be read",
    '{"image": "absent.jpg", "caption": "a"}': "absent.jpg cannot be read",
    '{"image": "text.jpg", "caption": "a"}': "text.jpg is not a JPEG",
    '{"image": "http://host/a.jpg", "caption": "a"}': "URL",
    '{"image": "a.jpg", "caption": "a", "image_id": 1e400}': "finite",
    '{"image": "a.jpg", "caption": "a", "image_id": NaN}': "finite",
    '{"image": "a.jpg", "caption": "c", "image_id": "\\ud83d"}': "lone surrogate",
    '{"image": "a.jpg", "caption": "nice \\ud83d"}': "lone surrogate",
    '{"image": "a.jpg", "caption": 7}': "not a text",
    '{"image": "a.jpg", "captions": {"a": 1}}': "not a text",
    '{"image": "a.jpg", "captions": [7, 8]}': "not a text",
    '{"image": "a.jpg", "captions": null}': "no caption",
    '{"image": "a.jpg", "captions": ["", "  "]}': "no caption",
    '{"image": "a.jpg"}': "no caption",
    '{"image": ' + "[" * 100_000: "not JSON",
    '{"image": "a.jpg", "image_id": ' + "9" * 5000 + "}": "not JSON",
    "{": "not JSON",
}


def test_unusable_lines_are_skipped_with_number_and_reason(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(inputs, "MAX_MESSAGES", 99)
    save_image(tmp_path / "a.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    good = ['{"image": "a.jpg", "captions": null, "caption": "one"}', '{"image": "a.jpg", "captions": ["two", ""]}']
    file = write_lines(tmp_path / "lines.jsonl", good[0], *UNUSABLE, "", good[1])
    problems = Problems()
    assert captions_in(read(file, problems).samples) == [["one"], ["two"]]
    assert (problems.count, problems.faults, problems.absent) == (len(UNUSABLE), len(UNUSABLE), 1)
    assert all(len(problem) < 6000 for problem in problems.first)
    reasons = {int(problem.split(", line ")[1].split(":")[0]): problem for problem in problems.first}
    for number, reason in enumerate(UNUSABLE.values(), 2):
        assert reasons[number].startswith(f"{file}, line {number}: ")
        assert reason in reasons[number]
    write_lines(file, '{"image": "a.jpg", "captions": ["good", "bad \\udc00"]}')  # a bad caption is skipped alone
    problems = Problems()
    assert captions_in(read(file, problems).samples) == [["good"]]
    assert problems.count == 1


def test_strict_stops_at_the_first_fault_and_others_keep_the_first_ten(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "bad.jsonl", *[{"image": "absent.jpg", "caption": "a"}] * 30)
    with pytest.raises(DataError, match=r"line 1: .*absent\.jpg.*import without --strict"):
        list(read(file).samples)
    write_lines(file, *["{"] * 30)
    problems = Problems()
    assert list(read(file, problems).samples) == []
    assert (problems.count, len(problems.first)) == (30, inputs.MAX_MESSAGES)


def test_paths_outside_the_folder_need_permission(tmp_path: Path) -> None:
    save_image(tmp_path / "secret.jpg")
    save_image(tmp_path / "data" / "a" / "b.jpg")
    for name in ("../secret.jpg", f"{tmp_path}/secret.jpg", "a/../../secret.jpg"):
        record = {"image": name, "caption": "a"}
        coco = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]}
        table = f"image,caption\n{name},a"
        contents = {"lines.jsonl": record, "list.json": [record], "table.csv": table, "coco.json": coco}
        for file, content in contents.items():
            path = write_lines(tmp_path / "data" / file, content)
            assert list(read(path, problems := Problems()).samples) == []
            assert "outside" in problems.first[0]
            assert captions_in(read(path, allow_outside=True).samples) == [["a"]]
    inside = {"image": str(tmp_path / "data" / "a" / "b.jpg"), "caption": "a"}
    assert captions_in(read(write_lines(tmp_path / "data" / "l.jsonl", inside)).samples) == [["a"]]


def test_links_are_followed_and_cycles_and_unreadable_folders_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    save_image(elsewhere / "deep" / "x.jpg", 1)
    save_image(data / "a.jpg", 2)
    save_image(data / "locked" / "x.jpg")
    for link, target in {
        "linked": elsewhere, "circle": data, "../elsewhere/back": data, "again": elsewhere,
        "nothing.jpg": tmp_path / "absent.jpg", "b.jpg": data / "a.jpg",
    }.items():  # fmt: skip
        (data / link).symlink_to(target)
    listdir = os.listdir
    denied = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(os, "listdir", lambda path: (denied if Path(path).name == "locked" else listdir)(path))
    problems = Problems()
    keys = sorted(sample["__key__"] for sample in read(data, problems).samples)
    assert keys == ["a", "again_deep_x", "b"]
    assert (problems.count, problems.faults) == (5, 2)
    for place in ("circle", "linked", "nothing.jpg", "locked: the folder cannot be read (Permission denied)"):
        assert str(data / place) in "\n".join(problems.first)


def test_every_image_suffix_is_read_and_others_counted(tmp_path: Path) -> None:
    names = [f"{number}.{suffix}" for number, suffix in enumerate(s for suffixes in FORMATS.values() for s in suffixes)]
    for number, name in enumerate(names):
        save_image(tmp_path / (name if number % 2 else name.upper()), number, "JPEG")
    for name in ("x.heic", "y.HEIF", "z.svg", "a.xmp", "b.xmp", "LICENSE", "notes.txt"):
        (tmp_path / name).write_text("no picture")
    problems = Problems()
    assert len(list(read(tmp_path, problems).samples)) == len(names)
    assert (problems.count, problems.faults) == (4, 0)
    assert problems.skipped == {".xmp": 2, "without suffix": 1}
    for kind in FORMATS:  # the extension follows the content
        save_image(tmp_path / "kinds" / f"{kind}.jpg", 3, kind)
    for sample in read(tmp_path / "kinds").samples:
        kind = sample["__key__"]
        assert Image.open(io.BytesIO(sample[FORMATS[kind][0]])).format == kind


def test_captions_are_found_under_common_file_names(tmp_path: Path) -> None:
    save_image(tmp_path / "x.jpg")
    for name in ("x.txt", "x.TXT", "x.jpg.Txt", "x.caption", "x.jpg.caption"):
        (tmp_path / name).write_text("said")
        assert captions_in(read(tmp_path).samples) == [["said"]]
        (tmp_path / name).unlink()


COCO = {
    "images": [
        {"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}, {"id": 1e400, "file_name": "c.jpg"},
        {"id": "2", "file_name": None}, {"file_name": "d.jpg"}, "text", None, {"id": 3, "file_name": ""},
    ],
    "annotations": [
        {"image_id": 1, "caption": "good"}, {"image_id": 1, "caption": None}, {"image_id": 7, "caption": "orphan"},
        {"image_id": 1}, [], {"image_id": 1, "caption": 5}, {"image_id": 1, "caption": "half \ud83d"},
    ],
}  # fmt: skip


def test_skipped_coco_entries_are_counted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(inputs, "MAX_MESSAGES", 99)
    save_image(tmp_path / "a.jpg")
    file = write_lines(tmp_path / "coco.json", COCO)
    problems = Problems()
    assert captions_in(read(file, problems, "coco").samples) == [["good"]]
    assert problems.count == 13
    for reason in ("its id occurs twice", "no image of this id", "lone surrogate", "not a text but None"):
        assert reason in "\n".join(problems.first)


SOURCES: dict[str, tuple[str, tuple[object, ...]]] = {  # file name and lines
    "jsonl": ("s.jsonl", ('{"image": "a.jpg", "captions": ["b", "c"], "image_id": 3}',) * 3),
    "list": ("s.json", ([{"image": "a.jpg", "caption": caption} for caption in (["b", "é"], "c")],)),
    "coco": ("s.json", (COCO,)),
    "table": ("s.csv", ("image,caption", 'a.jpg,"b, ""c"""', "a.jpg,d")),
    "token": ("s.txt", ("a.jpg#0\tA dog .", "a.jpg#1\tA cat .")),
    "text": ("s.txt", ("One. Two.\n\nThree é.",)),
    "karpathy": ("s.json", (
        {"images": [{"filename": "a.jpg", "split": "test", "imgid": 1, "sentences": [{"raw": "b"}, {"raw": "c"}]}]},
    )),
    "vg_qa": ("s.json", ([{"id": 1, "qas": [{"qa_id": 3, "question": "What?", "answer": "a sofa"}]}],)),
    "nlvr2": ("s.json", ('{"identifier": "a-0-0", "sentence": "b", "label": "True"}',) * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_mutated_sources_raise_only_expected_errors(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    for image in ("a.jpg", "1.jpg", "a-0-img0.png", "a-0-img1.png"):
        save_image(tmp_path / image)
    file, lines = SOURCES[name]
    source = write_lines(tmp_path / file, *lines)
    whole, num_read = source.read_bytes(), 0
    for number in range(fuzz_rounds(120)):
        source.write_bytes(mutate(whole, rng) if number else whole)
        try:
            samples = list(read(source, Problems(), min_count=1).samples)
        except MomeError as error:
            if str(source) not in str(error):
                raise
            continue
        num_read += len(samples)
        for sample in samples:
            if "captions" in record_of(sample) or "txt" in sample:
                assert all(caption.encode() for caption in captions_of(members_of(sample)))
    assert num_read > 0


def test_mutated_captions_are_clean_or_skipped(tmp_path: Path) -> None:
    rng = random.Random(7)
    save_image(tmp_path / "a.jpg")
    for encoding in READ * fuzz_rounds(40):
        (tmp_path / "a.txt").write_bytes(mutate(TEXT.encode(encoding), rng))
        for sample in read(tmp_path, problems := Problems()).samples:
            captions_of(members_of(sample))
            assert problems.count == 0
