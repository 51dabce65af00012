"""Untrusted input files: other encodings, cyclic links, odd suffixes, lists with paths outside their folder."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config.errors import DataError, MomeError
from pipeline.data.building.annotation_files import Options, find_annotations, read_annotations
from pipeline.data.building.files import Problems, Sample
from pipeline.data.building.importers import find_kind, folder_samples, jsonl_samples, read_samples, text_samples
from pipeline.data.contents.images import FORMATS
from pipeline.data.contents.members import captions_of
from tests.support.fuzz import fuzz_rounds, mutate

TEXT = "un café, 東京"
READ = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


def save_image(path: Path, shade: int = 0, kind: str = "JPEG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(path, kind)
    return path


def captions(samples: Iterator[Sample]) -> list[list[str]]:
    return [json.loads(sample["json"]).get("captions", []) for sample in samples]


@pytest.mark.parametrize("encoding", READ)
def test_files_are_read_in_every_marked_encoding(tmp_path: Path, encoding: str) -> None:
    save_image(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text(TEXT, encoding)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"image": "a.jpg", "caption": TEXT}, ensure_ascii=False) + "\n", encoding)
    problems = Problems(strict=True)
    assert captions(folder_samples(tmp_path, problems)) == [[TEXT]]
    assert captions(jsonl_samples(lines, problems)) == [[TEXT]]
    assert [sample["txt"].decode() for sample in text_samples(tmp_path / "a.txt", problems)] == [TEXT]
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": TEXT}]}
    (tmp_path / "coco.json").write_text(json.dumps(content, ensure_ascii=False), encoding)
    assert find_kind(tmp_path / "coco.json") == "coco"
    assert captions(read_samples(tmp_path / "coco.json", "coco", problems)) == [[TEXT]]
    assert problems.count == 0


@pytest.mark.parametrize(
    ("encoding", "reason"), [("latin-1", "not UTF-8"), ("cp1252", "not UTF-8"), ("utf-16-le", "NUL")]
)
def test_text_of_unknown_encoding_is_skipped_and_counted(tmp_path: Path, encoding: str, reason: str) -> None:
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.jpg", ord(name))
    (tmp_path / "a.txt").write_bytes("un café".encode(encoding))
    (tmp_path / "b.txt").write_text("fine")
    assert captions(folder_samples(tmp_path, problems := Problems())) == [["fine"]]
    assert (problems.count, reason in problems.first[0]) == (1, True)
    line = json.dumps({"image": "a.jpg", "caption": "un café"}, ensure_ascii=False)
    good = json.dumps({"image": "b.jpg", "caption": "fine"}) + "\n"
    (tmp_path / "lines.jsonl").write_bytes(good.encode() + (line.encode(encoding) + b"\n"))
    assert captions(jsonl_samples(tmp_path / "lines.jsonl", problems := Problems())) == [["fine"]]
    assert problems.count >= 1
    assert "line 2" in problems.first[0]
    (tmp_path / "prose.txt").write_bytes(b"First.\n\n" + "un café".encode(encoding) + b"\n\nLast.\n")
    problems = Problems()
    texts = [sample["txt"] for sample in text_samples(tmp_path / "prose.txt", problems)]
    assert b"First." in texts
    assert all("\ufffd" not in text.decode() and "\0" not in text.decode() for text in texts)
    assert problems.count >= 1


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "txt", "token"])
@pytest.mark.parametrize("damage", [b"\x00\xd8a\0", b"\0"], ids=["half a character", "half a unit"])
def test_damaged_file_in_utf16_is_named(tmp_path: Path, suffix: str, damage: bytes) -> None:
    source = tmp_path / f"a.{suffix}"
    source.write_bytes('\ufeff{"image": "a.jpg"}, '.encode("utf-16-le") + damage)

    def read() -> list[Sample]:
        return list(read_samples(source, find_kind(source), Problems()))

    for refused in (read, lambda: find_annotations(source)) if "json" in suffix else (read,):
        with pytest.raises(DataError, match=rf"a\.{suffix}.*UTF-8"):
            refused()


def test_null_captions_fall_back_to_caption(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    (tmp_path / "lines.jsonl").write_text('{"image": "a.jpg", "captions": null, "caption": "one"}')
    assert captions(jsonl_samples(tmp_path / "lines.jsonl", Problems(strict=True))) == [["one"]]


def test_lone_surrogates_are_reported(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    lines = [
        '{"image": "a.jpg", "caption": "nice \\ud83d"}',
        '{"image": "a\\ud83d.jpg", "caption": "b"}',
        '{"image": "a.jpg", "caption": "c", "image_id": "\\ud83d"}',
        '{"image": "a.jpg", "captions": ["good", "bad \\udc00"]}',
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    assert captions(jsonl_samples(tmp_path / "lines.jsonl", problems := Problems())) == [["good"]]
    assert problems.count == 4
    assert sum("lone surrogate" in problem for problem in problems.first) >= 3


WRONG_LINES = {
    '{"image": ""}': "expected",
    '{"image": "", "caption": "a"}': "expected",
    '{"image": " ", "caption": "a"}': "expected",
    '{"image": "a.jpg\\u0000", "caption": "a"}': "not a file path",
    '{"image": "' + "a" * 5000 + '.jpg", "caption": "a"}': "cannot be read",
    '{"image": "a.jpg", "caption": "a", "image_id": 1e400}': "finite",
    '{"image": "a.jpg", "caption": "a", "image_id": NaN}': "finite",
    "[" * 100_000: "not JSON",
    '{"image": ' + "[" * 100_000: "not JSON",
    '{"image": "a.jpg", "image_id": ' + "9" * 5000 + "}": "not JSON",
    '{"image": null, "caption": "a"}': "expected",
    '{"image": ["a.jpg"], "caption": "a"}': "expected",
    '{"image": "a.jpg", "caption": 7}': "not a text",
    '{"image": "a.jpg", "captions": {"a": 1}}': "not a text",
    '{"image": "a.jpg", "captions": null}': "no caption",
    '{"image": "a.jpg", "regions": 5, "caption": "a"}': "expected",
    '{"image": "http://host/a.jpg", "caption": "a"}': "URL",
    '{"image": ".", "caption": "a"}': "cannot be read",
    "null": "expected",
    "{": "not JSON",
}


@pytest.mark.parametrize("line", WRONG_LINES, ids=lambda line: line[:40])
def test_bad_lines_are_skipped_with_number_and_reason(tmp_path: Path, line: str) -> None:
    save_image(tmp_path / "a.jpg")
    good = '{"image": "a.jpg", "caption": "good"}'
    (tmp_path / "lines.jsonl").write_text("\n".join([good, line, "", good]))
    found = captions(jsonl_samples(tmp_path / "lines.jsonl", problems := Problems()))
    assert [caption for each in found for caption in each] == ["good", "good"]
    assert problems.count >= 1
    assert f"{tmp_path / 'lines.jsonl'}, line 2: " in problems.first[0]
    assert any(WRONG_LINES[line] in problem for problem in problems.first)
    assert all(len(problem) < 6000 for problem in problems.first)


@pytest.mark.parametrize("name", ["../secret.jpg", "{folder}/secret.jpg", "a/../../secret.jpg", "./../secret.jpg"])
def test_paths_outside_the_folder_need_permission(tmp_path: Path, name: str) -> None:
    save_image(tmp_path / "secret.jpg")
    save_image(tmp_path / "data" / "a" / "b.jpg")
    name = name.format(folder=tmp_path)
    record = {"image": name, "caption": "a"}
    (tmp_path / "data" / "lines.jsonl").write_text(json.dumps(record))
    (tmp_path / "data" / "list.json").write_text(json.dumps([record]))
    (tmp_path / "data" / "table.csv").write_text(f"image,caption\n{name},a\n")
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]}
    (tmp_path / "data" / "coco.json").write_text(json.dumps(coco))
    for file in ("lines.jsonl", "list.json", "table.csv", "coco.json"):
        path = tmp_path / "data" / file
        assert captions(read_samples(path, find_kind(path), problems := Problems())) == []
        assert "outside" in problems.first[0]
        assert captions(read_samples(path, find_kind(path), Problems(strict=True, allow_outside=True))) == [["a"]]
    inside = json.dumps({"image": str(tmp_path / "data" / "a" / "b.jpg"), "caption": "a"})
    (tmp_path / "data" / "lines.jsonl").write_text(inside)
    assert captions(jsonl_samples(tmp_path / "data" / "lines.jsonl", Problems(strict=True))) == [["a"]]


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    save_image(tmp_path / "elsewhere" / "deep" / "x.jpg", 1)
    save_image(tmp_path / "data" / "a.jpg", 2)
    data = tmp_path / "data"
    (data / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "circle").symlink_to(data, target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(data, target_is_directory=True)
    (data / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "nothing.jpg").symlink_to(tmp_path / "absent.jpg")
    (data / "b.jpg").symlink_to(data / "a.jpg")
    problems = Problems()
    keys = sorted(sample["__key__"] for sample in folder_samples(data, problems))
    assert keys == ["a", "again_deep_x", "b"]
    told = "\n".join(problems.first)
    for name in ("circle", "linked", "nothing.jpg"):
        assert str(data / name) in told
    assert problems.count == 4


def test_every_image_suffix_is_read_and_others_counted(tmp_path: Path) -> None:
    names = [f"{number}.{suffix}" for number, suffix in enumerate(s for suffixes in FORMATS.values() for s in suffixes)]
    for number, name in enumerate(names):
        save_image(tmp_path / name, number)
        (tmp_path / name).rename(tmp_path / (name if number % 2 else name.upper()))
    for name in ("x.heic", "y.HEIF", "z.svg"):
        (tmp_path / name).write_bytes(b"picture")
    for name in ("a.xmp", "b.xmp", "LICENSE", "notes.txt"):
        (tmp_path / name).write_text("no picture")
    assert len(list(folder_samples(tmp_path, problems := Problems()))) == len(names)
    assert problems.count == 4
    assert problems.faults == 0
    assert sum(problems.skipped.values()) == 3
    assert problems.skipped[".xmp"] == 2


@pytest.mark.parametrize("beside", ["x.txt", "x.TXT", "x.Txt", "x.jpg.txt", "x.jpg.TXT", "x.caption", "x.jpg.caption"])
def test_captions_are_found_under_common_file_names(tmp_path: Path, beside: str) -> None:
    save_image(tmp_path / "x.jpg")
    (tmp_path / beside).write_text("said")
    assert captions(folder_samples(tmp_path, Problems(strict=True))) == [["said"]]


def test_unreadable_folders_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "a" / "x.jpg")
    save_image(tmp_path / "b" / "x.jpg")
    listdir = os.listdir

    def fails(path: Path) -> list[str]:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", fails)
    assert len(list(folder_samples(tmp_path, problems := Problems()))) == 1
    assert "Permission denied" in problems.first[0]


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


def test_skipped_coco_entries_are_counted(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    found = captions(read_samples(tmp_path / "coco.json", "coco", problems := Problems(keep=99)))
    assert found == [["good"]]
    assert problems.count == 13
    told = "\n".join(problems.first)
    for reason in ("its id occurs twice", "no image of this id", "lone surrogate", "not a text but None"):
        assert reason in told


def members_of(sample: Sample) -> dict[str, bytes]:
    return {name: data for name, data in sample.items() if name != "__key__"}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda at: written(at / "s.jsonl", '{"image": "a.jpg", "captions": ["b", "c"], "image_id": 3}\n' * 3),
    "list": lambda at: written(at / "s.json", [{"image": "a.jpg", "caption": each} for each in (["b", "é"], "c")]),
    "coco": lambda at: written(at / "s.json", COCO),
    "table": lambda at: written(at / "s.csv", 'image,caption\na.jpg,"b, ""c"""\na.jpg,d\n'),
    "token": lambda at: written(at / "s.txt", "a.jpg#0\tA dog .\na.jpg#1\tA cat .\n"),
    "text": lambda at: written(at / "s.txt", "One. Two.\n\nThree é.\n"),
    "karpathy": lambda at: written(
        at / "s.json",
        {"images": [{"filename": "a.jpg", "split": "test", "imgid": 1, "sentences": [{"raw": "b"}, {"raw": "c"}]}]},
    ),
    "vg_qa": lambda at: written(
        at / "s.json", [{"id": 1, "qas": [{"qa_id": 3, "question": "What?", "answer": "a sofa"}]}]
    ),
    "nlvr2": lambda at: written(at / "s.json", '{"identifier": "a-0-0", "sentence": "b", "label": "True"}\n' * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_mutated_sources_raise_only_expected_errors(tmp_path: Path, name: str) -> None:
    """Mutated files are read as the kind that is detected, and as their original kind."""
    rng = random.Random(name)
    for image in ("a.jpg", "1.jpg", "a-0-img0.png", "a-0-img1.png"):
        save_image(tmp_path / image)
    source = SOURCES[name](tmp_path)
    whole = source.read_bytes()
    read = 0
    for number in range(fuzz_rounds(120)):
        source.write_bytes(mutate(whole, rng) if number else whole)
        try:
            annotations = find_annotations(source)
            if annotations is not None:
                options = Options(min_count=1)
                samples = list(read_annotations(source, annotations, Problems(), options).samples)
            else:
                samples = list(read_samples(source, find_kind(source), Problems()))
        except MomeError as error:
            if str(source) not in str(error):
                raise
            continue
        read += len(samples)
        for sample in samples:
            record = json.loads(sample["json"]) if "json" in sample else {}
            if "captions" in record or "txt" in sample:
                assert all(caption.encode() for caption in captions_of(members_of(sample)))
    assert read > 0


def test_mutated_captions_are_clean_or_skipped(tmp_path: Path) -> None:
    rng = random.Random(7)
    save_image(tmp_path / "a.jpg")
    for encoding in READ:
        whole = TEXT.encode(encoding)
        for _ in range(fuzz_rounds(40)):
            (tmp_path / "a.txt").write_bytes(mutate(whole, rng))
            for sample in folder_samples(tmp_path, problems := Problems()):
                captions_of(members_of(sample))
                assert problems.count == 0


def test_unsupported_formats_are_named(tmp_path: Path) -> None:
    for kind, suffixes in FORMATS.items():
        save_image(tmp_path / f"{kind}.jpg", 3, kind)
        (sample,) = (each for each in folder_samples(tmp_path, Problems()) if each["__key__"] == kind)
        assert suffixes[0] in sample
        assert Image.open(io.BytesIO(sample[suffixes[0]])).format == kind
