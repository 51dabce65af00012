"""Untrusted input files (encodings, cyclic links, paths outside their folder), and published annotation files."""

import io
import json
import os
import random
import re
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline.config.errors import DataError, MomeError
from pipeline.data.building import inputs
from pipeline.data.building.importers import find_kind
from pipeline.data.building.inputs import Problems
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.images import EXTENSIONS, FORMATS
from pipeline.data.contents.members import BOTH, Annotation, annotation_of, captions_of, image_bytes
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.shards_command import TABLES, captions_in, members_of, read, record_of, save_image, write_lines

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
            assert (find_kind(tmp_path / name), captions_in(read(tmp_path / name).samples)) == (kind, [[TEXT]])
    rng = random.Random(7)
    for encoding in READ * fuzz_rounds(40):  # a damaged caption is clean, or its image is skipped
        (tmp_path / "a.txt").write_bytes(mutate(TEXT.encode(encoding), rng))
        for sample in read(tmp_path, problems := Problems()).samples:
            assert (captions_of(members_of(sample)) != [], problems.count) == (True, 0)


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
    assert ("First." in texts, problems.count >= 1) == (True, True)
    assert not any(bad in text for text in texts for bad in "\ufffd\0")
    for suffix, damage in product(("json", "jsonl", "csv", "txt"), (b"\x00\xd8a\0", b"\0")):  # half a character or unit
        source = tmp_path / f"c.{suffix}"
        source.write_bytes('\ufeff{"image": "a.jpg"}, '.encode("utf-16-le") + damage)
        with pytest.raises(DataError, match=rf"c\.{suffix}.*UTF-8"):
            list(read(source, Problems()).samples)


UNUSABLE = {  # reason -> lines
    "expected": (
        *('{"image": ' + image + ', "caption": "a"}' for image in ('""', '" "', "null", '["a.jpg"]')), "null", "[1, 2]",
        '{"captions": ["a"]}', '{"image": "a.jpg", "regions": 5, "caption": "a"}',
    ),
    "not a file path": ('{"image": "a.jpg\\u0000", "caption": "a"}', '{"image": "a\\ud83d.jpg", "caption": "b"}'),
    "cannot be read": ('{"image": "' + "a" * 5000 + '.jpg", "caption": "a"}', '{"image": ".", "caption": "a"}'),
    "absent.jpg cannot be read": ('{"image": "absent.jpg", "caption": "a"}',),
    "text.jpg is not a JPEG": ('{"image": "text.jpg", "caption": "a"}',),
    "URL": ('{"image": "http://host/a.jpg", "caption": "a"}',),
    **{reason: tuple('{"image": "a.jpg"' + more + "}" for more in lines) for reason, lines in {
        "finite": (', "caption": "a", "image_id": 1e400', ', "caption": "a", "image_id": NaN'),
        "lone surrogate": (', "caption": "c", "image_id": "\\ud83d"', ', "caption": "nice \\ud83d"'),
        "not a text": (', "caption": 7', ', "captions": {"a": 1}', ', "captions": [7, 8]'),
        "no caption": (', "captions": null', ', "captions": ["", "  "]', ""),
    }.items()},
    "not JSON": ('{"image": ' + "[" * 100_000, '{"image": "a.jpg", "image_id": ' + "9" * 5000 + "}", "{"),
}  # fmt: skip


def test_unusable_lines_and_entries_are_skipped_with_place_and_reason(tmp_path: Path, monkeypatch: Any) -> None:
    save_image(tmp_path / "a.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    good = ['{"image": "a.jpg", "captions": null, "caption": "one"}', '{"image": "a.jpg", "captions": ["two", ""]}']
    lines = [(line, reason) for reason, lines in UNUSABLE.items() for line in lines]
    file = write_lines(tmp_path / "lines.jsonl", good[0], *(line for line, _ in lines), "", good[1])
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "MAX_MESSAGES", 99)
        samples = list(read(file, problems := Problems()).samples)
        entries = list(read(write_lines(tmp_path / "coco.json", COCO), skipped := Problems(), "coco").samples)
    assert (captions_in(entries), skipped.count) == ([["good"]], 13)
    for reason in ("its id occurs twice", "no image of this id", "lone surrogate", "not a text but None"):
        assert reason in "\n".join(skipped.first)
    assert captions_in(samples) == [["one"], ["two"]]
    assert (problems.count, problems.faults, problems.absent) == (len(lines), len(lines), 1)
    by_line = sorted(problems.first, key=lambda problem: int(problem.split(", line ")[1].split(":")[0]))
    for problem, (number, (_, reason)) in zip(by_line, enumerate(lines, 2), strict=True):
        assert re.match(rf"{re.escape(f'{file}, line {number}: ')}.*{re.escape(reason)}", problem)
        assert len(problem) < 6000
    write_lines(file, '{"image": "a.jpg", "captions": ["good", "bad \\udc00"]}')  # a bad caption is skipped alone
    samples = list(read(file, problems := Problems()).samples)
    assert (captions_in(samples), problems.count) == ([["good"]], 1)
    write_lines(file, *[{"image": "absent.jpg", "caption": "a"}] * 30)  # the first ten are kept
    samples = list(read(file, problems := Problems()).samples)
    assert (samples, problems.count, len(problems.first)) == ([], 30, inputs.MAX_MESSAGES)
    with pytest.raises(DataError, match=r"line 1: .*absent\.jpg.*import without --strict"):
        list(read(file).samples)


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


def test_links_are_followed_and_cycles_and_unreadable_folders_counted(tmp_path: Path, monkeypatch: Any) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    save_image(elsewhere / "deep" / "x.jpg", 1)
    save_image(data / "a.jpg", 2)
    save_image(data / "locked" / "x.jpg")
    for link, target in {
        "linked": elsewhere, "circle": data, "../elsewhere/back": data, "again": elsewhere,
        "nothing.jpg": tmp_path / "absent.jpg", "b.jpg": data / "a.jpg",
    }.items():  # fmt: skip
        (data / link).symlink_to(target)
    listdir, denied = os.listdir, Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(os, "listdir", lambda path: (denied if Path(path).name == "locked" else listdir)(path))
    samples = read(data, problems := Problems()).samples
    assert sorted(sample["__key__"] for sample in samples) == ["a", "again_deep_x", "b"]
    assert (problems.count, problems.faults) == (5, 2)
    for place in ("circle", "linked", "nothing.jpg", "locked: the folder cannot be read (Permission denied)"):
        assert str(data / place) in "\n".join(problems.first)


def test_every_image_suffix_is_read_and_others_counted(tmp_path: Path) -> None:
    for number, suffix in enumerate(EXTENSIONS):
        save_image(tmp_path / f"{number}.{suffix if number % 2 else suffix.upper()}", number, "JPEG")
    for name in ("x.heic", "y.HEIF", "z.svg", "a.xmp", "b.xmp", "LICENSE", "notes.txt"):
        (tmp_path / name).write_text("no picture")
    assert len(list(read(tmp_path, problems := Problems()).samples)) == len(EXTENSIONS)
    assert (problems.count, problems.faults, problems.skipped) == (4, 0, {".xmp": 2, "without suffix": 1})
    for kind in FORMATS:  # the extension follows the content
        save_image(tmp_path / "kinds" / f"{kind}.jpg", 3, kind)
    for sample in read(tmp_path / "kinds").samples:
        assert Image.open(io.BytesIO(sample[FORMATS[sample["__key__"]][0]])).format == sample["__key__"]


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
FUZZED = ("more.csv", "results.csv", "quoted_semicolon.csv", "open_clip.tsv", "Flickr8k.token.txt")
_SPLIT = {"filename": "a.jpg", "split": "test", "imgid": 1, "sentences": [{"raw": "b"}, {"raw": "c"}]}
SOURCES: dict[str, tuple[str, tuple[object, ...]]] = {  # file name and lines
    "jsonl": ("s.jsonl", ('{"image": "a.jpg", "captions": ["b", "c"], "image_id": 3}',) * 3),
    "list": ("s.json", ([{"image": "a.jpg", "caption": caption} for caption in (["b", "é"], "c")],)),
    "coco": ("s.json", (COCO,)),
    "table": ("s.csv", ("image,caption", 'a.jpg,"b, ""c"""', "a.jpg,d")),
    **{name: (name, (table,)) for name, table in TABLES.items() if name in FUZZED},
    "parquet": ("s.parquet", ()),
    "text": ("s.txt", ("One. Two.\n\nThree é.",)),
    "karpathy": ("s.json", ({"images": [_SPLIT]},)),
    "vg_qa": ("s.json", ([{"id": 1, "qas": [{"qa_id": 3, "question": "What?", "answer": "a sofa"}]}],)),
    "nlvr2": ("s.json", ('{"identifier": "a-0-0", "sentence": "b", "label": "True"}',) * 2),
}


@pytest.mark.parametrize("name", SOURCES)
def test_mutated_sources_raise_only_expected_errors(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    for image in ("a.jpg", "1.jpg", "a-0-img0.png", "a-0-img1.png"):
        save_image(tmp_path / image)
    file, lines = SOURCES[name]
    source, num_read = write_lines(tmp_path / file, *lines), 0
    if name == "parquet":
        data = (tmp_path / "a.jpg").read_bytes()
        pyarrow.parquet.write_table(pyarrow.table({"image": [data] * 3, "caption": ["one", "two", "é"]}), source)
    whole = source.read_bytes()
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
                assert all("\ufffd" not in caption and caption.encode() for caption in captions_of(members_of(sample)))
    assert num_read > 0


def vqa_files(folder: Path, subtype: str = "train2014") -> tuple[Path, Path]:
    """Write three questions about two images under VQA's file names, and their annotations; the last is rare."""
    rows = [  # question id, image, question, most frequent answer, all answers
        (10, 1, "What is it?", "net", [*["net"] * 3, "a net", *["mesh"] * 2]),
        (11, 1, "Is it a net?", "yes", [*["Yes."] * 9, "no"]),
        (20, 2, "Why?", "because", ["because"]),
    ]
    questions = [{"question_id": number, "image_id": image, "question": text} for number, image, text, *_ in rows]
    answers = [{"multiple_choice_answer": row[3], "answers": [{"answer": text} for text in row[4]]} for row in rows]
    annotations = [{"question_id": row[0]} | answer for row, answer in zip(rows, answers, strict=True)]
    for image in (1, 2):
        save_image(folder / f"COCO_{subtype}_{image:012d}.jpg", image)
    content = {"info": {}, "data_subtype": subtype, "questions": questions}
    file = write_lines(folder / f"v2_mscoco_{subtype}_annotations.json", {"annotations": annotations, "info": {}})
    return write_lines(folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json", content), file


def test_vqa_questions_get_scored_answers_and_the_list_of_all_annotation_files(tmp_path: Path) -> None:
    file, annotations = vqa_files(tmp_path)
    assert find_kind(file) == "vqa"
    imported = read(file, min_count=1)
    first, second, third = imported.samples
    assert record_of(first) == {"question": "What is it?", "answers": {"net": 1.0, "mesh": 0.6}, "question_id": 10}
    assert record_of(second)["answers"] == {"yes": 1.0, "no": 0.3}
    assert third["jpg"] == (tmp_path / "COCO_train2014_000000000002.jpg").read_bytes()
    assert len({first["__key__"], second["__key__"], third["__key__"]}) == len(imported.choices[ANSWERS]) == 3
    assert annotation_of(members_of(first), "questions").answers["net"] == 1.0
    content = json.loads(file.read_text())
    bad = content | {"questions": [entry | {"image_id": "x1"} for entry in content["questions"]]}
    with pytest.raises(DataError, match=r"none of its questions can be used; .*x1.*; expected 'questions'"):
        list(read(write_lines(tmp_path / "bad.json", bad), Problems(), annotations=(annotations,)).samples)
    (tmp_path / "COCO_train2014_000000000002.jpg").unlink()
    assert len(list(read(file, problems := Problems(), min_count=1).samples)) == 2
    assert "question 20" in problems.first[0]
    unanswered = content | {"questions": [{"question_id": 99, "image_id": 1, "question": "?"}]}
    other = write_lines(tmp_path / "questions.json", unanswered)
    assert list(read(other, problems := Problems(), annotations=(annotations,), min_count=1).samples) == []
    assert "question 99: it has no answers in" in problems.first[0]
    for chosen, reason in (
        ((annotations,), "pass --min-count below the published 9"),
        ((file,), r"is not a VQA annotations file.*'annotations'"),
        ((), "Pass --annotations FILE"),
    ):
        if not chosen:
            annotations.unlink()
        with pytest.raises(DataError, match=reason):
            list(read(file, annotations=chosen).samples)
    (train, first), (val, other) = vqa_files(tmp_path / "train"), vqa_files(tmp_path / "val", "val2014")
    for file in (train, val):
        imported = read(file, annotations=(first, other), min_count=2)
        assert (len(list(imported.samples)), imported.choices[ANSWERS]) == (3, ("net", "yes", "because"))
    *frequent, rare = json.loads(first.read_text())["annotations"]
    for times, min_count in ((2, 2), (9, None)):  # 9 is the default
        write_lines(first, {"annotations": frequent * times + [rare] * (times - 1)})
        imported = read(train, problems := Problems(strict=True), min_count=min_count, listed_only=True)
        assert [record_of(sample)["question_id"] for sample in imported.samples] == [10, 11]
        assert (problems.count, imported.choices[ANSWERS]) == (1, ("net", "yes"))
        assert "none of its answers is listed" in problems.first[0]


def test_visual_genome_questions_have_one_answer(tmp_path: Path) -> None:
    qas = [{"qa_id": 3, "question": "What is it?", "answer": "A sofa."}, {"qa_id": 4, "question": "?", "answer": "."}]
    file = write_lines(tmp_path / "question_answers.json", [{"id": 4, "qas": qas}])
    save_image(tmp_path / "VG_100K_2" / "4.jpg")
    assert find_kind(file) == "vg_qa"
    (sample,) = read(file, problems := Problems(), min_count=1).samples
    assert record_of(sample)["answers"] == {"sofa": 1.0}
    assert problems.first == [f"{file}, question 4: its answer is empty"]


def test_nlvr2_images_are_found_in_every_release_layout(tmp_path: Path) -> None:
    rows = {"dev-8-0-0": "True", "dev-8-0-1": "False", "train-9-1-0": "True", "dev-7-0-0": "True", "bad": "perhaps"}
    statements = [{"identifier": name, "sentence": "Both are red.", "label": label} for name, label in rows.items()]
    statements[2]["directory"] = "37"
    file = write_lines(tmp_path / "dev.json", *statements[:4], "{", statements[4])
    left, right = (save_image(tmp_path / f"dev-8-0-img{side}.png", side) for side in (0, 1))
    for side in (0, 1):
        save_image(tmp_path / "train" / "37" / f"train-9-1-img{side}.png", 3 + side)
    assert find_kind(file) == "nlvr2"
    one, two, three = read(file, problems := Problems()).samples
    assert [image_bytes(members_of(one), prefixes) for prefixes in BOTH] == [left, right]
    assert annotation_of(members_of(one), "statements") == Annotation("Both are red.", label=1, id="dev-8-0-0")
    assert (record_of(two)["label"], three["__key__"]) == (False, "train-9-1-0")
    assert (problems.count, problems.absent) == (3, 1)  # an image of dev-7, a line that is not JSON, a label
    assert (
        "line 6: cannot be used (its label is neither True nor False but 'perhaps'); expected an object"
        in problems.first[1]
    )
    assert "line 4: image" in problems.first[2]


def test_karpathy_splits_share_no_image(tmp_path: Path) -> None:
    """Trap 9: ViLT's release selects models on test and trains Flickr30k on val; here splits are built by name."""
    images = []
    for n, split in enumerate(["train", "restval", "val", "test"]):
        save_image(tmp_path / "val2014" / f"COCO_{n}.jpg", n)
        sentences = [{"raw": f"picture {n}, said {k}", "tokens": []} for k in range(2)]
        image = {"filename": f"COCO_{n}.jpg", "filepath": "val2014", "split": split, "cocoid": 100 + n, "imgid": n}
        images.append(image | {"sentences": sentences})
    file = write_lines(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert find_kind(file) == "karpathy"
    for split, numbers in {"train": [0, 1], "val": [2], "test": [3], None: [0, 1, 2, 3]}.items():
        samples = read(file, split=split).samples
        expected = [{"image_id": 100 + n, "captions": [f"picture {n}, said {k}" for k in range(2)]} for n in numbers]
        assert [record_of(sample) for sample in samples] == expected
    with pytest.raises(DataError, match=r"no image is in split 'dev'; expected one of train \(1\)"):
        list(read(file, split="dev").samples)


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    for name, number in (("n02/a/x.jpg", 1), ("n01/y.png", 2), ("n02/z.jpg", 3)):
        save_image(tmp_path / "a" / name, number)
    imported = read(tmp_path / "a", kind="classes")
    assert [annotation_of(sample, "labelled", 2).label for sample in imported.samples] == [0, 1, 1]
    assert imported.choices[CLASSES] == ("n01", "n02")
    for file in ("n01", "n01/y.png"):
        with pytest.raises(DataError, match="it has no folder"):
            list(read(tmp_path / "a" / file, Problems(), kind="classes").samples)
    save_image(tmp_path / "b" / os.fsdecode(b"caf\xe9") / "1.jpg")
    imported = read(tmp_path / "b", kind="classes")  # names are clean text
    assert len(list(imported.samples)) == 1
    assert Choices.from_bytes(imported.choices[CLASSES].to_bytes(), "list") == (r"caf\xe9",)
    save_image(tmp_path / "a" / "stray.jpg")
    (tmp_path / "a" / "__MACOSX").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    imported = read(tmp_path / "a", problems := Problems(), "classes")
    assert [annotation_of(sample, "labelled", 3).label for sample in imported.samples] == [1, 2, 2]
    assert (problems.skipped, problems.faults) == ({".txt": 1}, 1)
    empty = "it is class 0 without an image; if it is not a class, remove it and build again"
    stray = f"{tmp_path}/a/stray.jpg: it is not in a class folder"
    assert problems.first == [stray, f"{tmp_path}/a/__MACOSX: {empty}"]


def test_published_annotations_are_read(shared: Path) -> None:
    folder = shared / "data" / "region_features"
    for file, images, kind, count in (
        ("vqav2/questions.json", "vqav2", "vqa", 3),
        ("vgqa/question_answers.json", "vgqa", "vg_qa", 8),
        ("nlvr2/tiny-dev.json", "nlvr2", "nlvr2", 8),
    ):
        assert find_kind(folder / file) == kind
        samples = [*map(members_of, read(folder / file, images=folder / "images" / images, min_count=1).samples)]
        assert len(samples) == count
        for members in samples:
            if kind == "nlvr2":
                assert annotation_of(members, "statements").id.count("-") == 3
                assert all(image_bytes(members, prefixes) for prefixes in BOTH)
            else:
                assert annotation_of(members, "questions").answers
