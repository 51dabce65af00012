"""Importers of published annotation files: hand-written ones in each format, and the real ones of ../shared/data."""

import json
import os
from pathlib import Path

import pytest

from pipeline.config.errors import DataError
from pipeline.data.building.importers import find_kind, write_shards
from pipeline.data.building.inputs import Problems
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.members import both_images, class_of, question_of, statement_of
from pipeline.data.reading.samples import iter_samples
from pipeline.data.storage import Storage
from tests.support.imports import captions_in, members_of, read, record_of, save_image, write_lines

ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


def vqa_files(folder: Path, subtype: str = "train2014") -> Path:
    """Write three questions about two images under VQA's file names; the last has no frequent answer."""
    rows = [  # question id, image, question, most frequent answer, all answers
        (10, 1, "What is it?", "net", [*["net"] * 3, "a net", *["mesh"] * 2]),
        (11, 1, "Is it a net?", "yes", [*["Yes."] * 9, "no"]),
        (20, 2, "Why?", "because", ["because"]),
    ]
    questions = [{"question_id": row[0], "image_id": row[1], "question": row[2]} for row in rows]
    annotations = [
        {"question_id": row[0], "multiple_choice_answer": row[3], "answers": [{"answer": text} for text in row[4]]}
        for row in rows
    ]
    write_lines(folder / f"v2_mscoco_{subtype}_annotations.json", {"annotations": annotations, "info": {}})
    for image in (1, 2):
        save_image(folder / f"COCO_{subtype}_{image:012d}.jpg", image)
    content = {"info": {}, "data_subtype": subtype, "questions": questions}
    return write_lines(folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json", content)


def test_vqa_questions_get_scored_answers_and_a_list(tmp_path: Path) -> None:
    file = vqa_files(tmp_path)
    assert find_kind(file) == "vqa"
    imported = read(file, min_count=1)
    first, second, third = imported.samples
    assert record_of(first) == {"question": "What is it?", "answers": {"net": 1.0, "mesh": 0.6}, "question_id": 10}
    assert record_of(second)["answers"] == {"yes": 1.0, "no": 0.3}
    assert third["jpg"] == (tmp_path / "COCO_train2014_000000000002.jpg").read_bytes()
    assert len({first["__key__"], second["__key__"], third["__key__"]}) == 3
    assert imported.choices[ANSWERS] == ("net", "yes", "because")
    assert question_of(members_of(first)).answers["net"] == 1.0
    content = json.loads(file.read_text())
    write_lines(file, content | {"questions": [entry | {"image_id": "x1"} for entry in content["questions"]]})
    with pytest.raises(DataError, match=r"none of its questions can be used; .*x1.*; expected 'questions'"):
        list(read(file, Problems()).samples)


def test_listed_answers_are_those_of_all_annotation_files(tmp_path: Path) -> None:
    train, val = vqa_files(tmp_path / "train"), vqa_files(tmp_path / "val", "val2014")
    annotations = (train.with_name(ANNOTATIONS), val.with_name(ANNOTATIONS.replace("train", "val")))
    for file in (train, val):
        imported = read(file, annotations=annotations, min_count=2)
        assert len(list(imported.samples)) == 3
        assert imported.choices[ANSWERS] == ("net", "yes", "because")
    content = json.loads(annotations[0].read_text())
    content["annotations"] = [*content["annotations"][:2], *content["annotations"]]  # the first two are chosen twice
    write_lines(annotations[0], content)
    imported = read(train, problems := Problems(strict=True), min_count=2, listed_only=True)
    assert [record_of(sample)["question_id"] for sample in imported.samples] == [10, 11]
    assert problems.count == 1
    assert "none of its answers is listed" in problems.first[0]


def test_missing_inputs_are_reported_per_question(tmp_path: Path) -> None:
    file, annotations = vqa_files(tmp_path), (tmp_path / ANNOTATIONS,)
    (tmp_path / "COCO_train2014_000000000002.jpg").unlink()
    assert len(list(read(file, problems := Problems(), min_count=1).samples)) == 2
    assert "question 20" in problems.first[0]
    unanswered = json.loads(file.read_text()) | {"questions": [{"question_id": 99, "image_id": 1, "question": "?"}]}
    other = write_lines(tmp_path / "questions.json", unanswered)
    assert list(read(other, problems := Problems(), annotations=annotations, min_count=1).samples) == []
    assert "question 99: it has no answers in" in problems.first[0]
    for chosen, reason in (
        (annotations, "pass --min-count below the published 9"),
        ((file,), r"is not a VQA annotations file.*'annotations'"),
        ((), "Pass --annotations FILE"),
    ):
        if not chosen:
            annotations[0].unlink()
        with pytest.raises(DataError, match=reason):
            list(read(file, annotations=chosen).samples)


def test_visual_genome_questions_have_one_answer(tmp_path: Path) -> None:
    qas = [{"qa_id": 3, "question": "What is it?", "answer": "A sofa."}, {"qa_id": 4, "question": "?", "answer": "."}]
    file = write_lines(tmp_path / "question_answers.json", [{"id": 4, "qas": qas}])
    save_image(tmp_path / "VG_100K_2" / "4.jpg")
    assert find_kind(file) == "vg_qa"
    (sample,) = read(file, problems := Problems(), min_count=1).samples
    assert record_of(sample)["answers"] == {"sofa": 1.0}
    assert problems.first == [f"{file}, question 4: its answer is empty"]


def test_nlvr2_images_are_found_in_every_release_layout(tmp_path: Path) -> None:
    rows = [("dev-8-0-0", "True"), ("dev-8-0-1", "False"), ("train-9-1-0", "True"), ("dev-7-0-0", "True")]
    rows += [("dev-8-0-0", "perhaps")]
    statements = [{"identifier": name, "sentence": "Both are red.", "label": label} for name, label in rows]
    statements[2]["directory"] = "37"
    file = write_lines(tmp_path / "dev.json", *statements[:4], "{", statements[4])
    left, right = (save_image(tmp_path / f"dev-8-0-img{side}.png", side) for side in (0, 1))
    for side in (0, 1):
        save_image(tmp_path / "train" / "37" / f"train-9-1-img{side}.png", 3 + side)
    assert find_kind(file) == "nlvr2"
    one, two, three = read(file, problems := Problems()).samples
    assert both_images(members_of(one)) == (left, right)
    assert (statement_of(members_of(one)).is_true, statement_of(members_of(one)).id) == (True, "dev-8-0-0")
    assert record_of(two)["label"] is False
    assert three["__key__"] == "train-9-1-0"
    assert (problems.count, problems.absent) == (3, 1)  # an image of dev-7, a line that is not JSON, a label
    assert "line 6: cannot be used (KeyError: 'perhaps'); expected an object with 'identifier'" in problems.first[1]
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
        samples = list(read(file, split=split).samples)
        assert captions_in(samples) == [[f"picture {n}, said {k}" for k in range(2)] for n in numbers]
        assert [record_of(sample)["image_id"] for sample in samples] == [100 + n for n in numbers]
    with pytest.raises(DataError, match=r"no image is in split 'dev'; expected one of train \(1\)"):
        list(read(file, split="dev").samples)


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    for name, number in (("n02/a/x.jpg", 1), ("n01/y.png", 2), ("n02/z.jpg", 3)):
        save_image(tmp_path / "a" / name, number)
    imported = read(tmp_path / "a", kind="classes")
    assert [class_of(sample, 2) for sample in imported.samples] == [0, 1, 1]
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
    assert [class_of(sample, 3) for sample in imported.samples] == [1, 2, 2]
    assert (problems.skipped, problems.faults) == ({".txt": 1}, 1)
    empty = "it is class 0 without an image; if it is not a class, remove it and build again"
    assert problems.first == [
        f"{tmp_path / 'a' / 'stray.jpg'}: it is not in a class folder", f"{tmp_path / 'a' / '__MACOSX'}: {empty}",
    ]  # fmt: skip


def test_published_annotations_round_trip_through_shards(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "region_features"
    for file, images, kind, count in (
        ("vqav2/questions.json", "vqav2", "vqa", 3),
        ("vgqa/question_answers.json", "vgqa", "vg_qa", 8),
        ("nlvr2/tiny-dev.json", "nlvr2", "nlvr2", 8),
    ):
        assert find_kind(folder / file) == kind
        imported = read(folder / file, images=folder / "images" / images, min_count=1)
        write_shards(Storage(), imported.samples, str(tmp_path / kind))
        samples = list(iter_samples(Storage(), str(tmp_path / kind)))
        assert len(samples) == count
        for sample in samples:
            if kind == "nlvr2":
                assert statement_of(sample.members).id.count("-") == 3
                both_images(sample.members)
            else:
                assert question_of(sample.members).answers
