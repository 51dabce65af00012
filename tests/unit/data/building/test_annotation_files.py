"""Importers of published annotation files: hand-written ones in each format, and the real ones of ../shared/data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import DataError
from pipeline.data.building.annotation_files import Annotations, Options, find_annotations, read_annotations
from pipeline.data.building.files import Problems, Sample
from pipeline.data.building.importers import write_shards
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.members import captions_of, class_of, image_id_of
from pipeline.data.contents.questions import both_images, question_of, statement_of
from pipeline.data.reading.samples import iter_samples
from pipeline.data.storage import Storage
from tests.support.pairs import picture


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_picture(path: Path, number: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))
    return picture(number)


def people(*answers: str) -> list[dict[str, str]]:
    return [{"answer": answer, "answer_confidence": "yes"} for answer in answers]


def vqa_files(folder: Path, subtype: str = "train2014") -> Path:
    """Write three questions about two images under VQA's file names; the last has no frequent answer."""
    questions = [
        {"question_id": 10, "image_id": 1, "question": "What is it?"},
        {"question_id": 11, "image_id": 1, "question": "Is it a net?"},
        {"question_id": 20, "image_id": 2, "question": "Why?"},
    ]
    annotations = [
        {"question_id": 10, "multiple_choice_answer": "net", "answers": people(*["net"] * 3, "a net", *["mesh"] * 2)},
        {"question_id": 11, "multiple_choice_answer": "yes", "answers": people(*["Yes."] * 9, "no")},
        {"question_id": 20, "multiple_choice_answer": "because", "answers": people("because")},
    ]
    write_json(folder / f"v2_mscoco_{subtype}_annotations.json", {"annotations": annotations, "info": {}})
    for image in (1, 2):
        write_picture(folder / f"COCO_{subtype}_{image:012d}.jpg", image)
    content = {"info": {}, "data_subtype": subtype, "questions": questions}
    return write_json(folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json", content)


def samples_of(found: Annotations) -> list[Sample]:
    return list(found.samples)


def said(sample: Sample) -> dict[str, Any]:
    return json.loads(sample["json"])


def test_vqa_questions_get_scored_answers_and_a_list(tmp_path: Path) -> None:
    file = vqa_files(tmp_path)
    assert find_annotations(file) == "vqa"
    found = read_annotations(file, "vqa", problems := Problems(), Options(min_count=1))
    first, second, third = samples_of(found)
    assert said(first) == {"question": "What is it?", "answers": {"net": 1.0, "mesh": 0.6}, "question_id": 10}
    assert said(second)["answers"] == {"yes": 1.0, "no": 0.3}
    assert third["jpg"] == picture(2)
    assert len({first["__key__"], second["__key__"], third["__key__"]}) == 3
    assert found.choices[ANSWERS].names == ("net", "yes", "because")
    assert problems.count == 0
    assert question_of({name: data for name, data in first.items() if name != "__key__"}).answers["net"] == 1.0


def test_splits_with_equal_annotations_share_the_list(tmp_path: Path) -> None:
    train, val = vqa_files(tmp_path / "train"), vqa_files(tmp_path / "val", "val2014")
    both = tuple(
        file.with_name(file.name.replace("OpenEnded_", "").replace("questions", "annotations")) for file in (train, val)
    )
    options = Options(annotations=both, min_count=2, listed_only=True)
    lists = [read_annotations(file, "vqa", Problems(), options).choices[ANSWERS] for file in (train, val)]
    assert lists[0] == lists[1]
    assert lists[0].names == ("net", "yes", "because")


def test_listed_only_skips_and_counts_other_questions(tmp_path: Path) -> None:
    file = vqa_files(tmp_path)
    content = json.loads((annotations := tmp_path / "v2_mscoco_train2014_annotations.json").read_text())
    content["annotations"] = [*content["annotations"][:2], *content["annotations"]]  # the first two are chosen twice
    write_json(annotations, content)
    options = Options(min_count=2, listed_only=True)
    found = read_annotations(file, "vqa", problems := Problems(strict=True), options)
    assert [said(sample)["question_id"] for sample in samples_of(found)] == [10, 11]
    assert problems.count == 1
    assert "none of its answers is listed" in problems.first[0]


def test_missing_inputs_are_reported_per_question(tmp_path: Path) -> None:
    file = vqa_files(tmp_path)
    (tmp_path / "COCO_train2014_000000000002.jpg").unlink()
    assert len(samples_of(read_annotations(file, "vqa", problems := Problems(), Options(min_count=1)))) == 2
    assert "question 20" in problems.first[0]
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(DataError, match="Pass --annotations FILE"):
        read_annotations(file, "vqa", Problems(), Options())
    with pytest.raises(DataError, match=r"is not a VQA annotations file.*'annotations'"):
        read_annotations(file, "vqa", Problems(), Options(annotations=(file,)))


def test_empty_list_of_answers_is_rejected_with_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pass --min-count below the published 9"):
        read_annotations(vqa_files(tmp_path), "vqa", Problems(), Options())


def test_visual_genome_questions_have_one_answer(tmp_path: Path) -> None:
    qas = [
        {"qa_id": 3, "question": "What is it?", "answer": "A sofa.", "image_id": 4},
        {"qa_id": 4, "question": "?", "answer": "."},
    ]
    file = write_json(tmp_path / "question_answers.json", [{"id": 4, "qas": qas}])
    write_picture(tmp_path / "VG_100K_2" / "4.jpg")
    assert find_annotations(file) == "vg_qa"
    (sample,) = samples_of(read_annotations(file, "vg_qa", problems := Problems(), Options(min_count=1)))
    assert said(sample)["answers"] == {"sofa": 1.0}
    assert problems.count == 1


def nlvr2_line(identifier: str, label: str, **more: Any) -> str:
    return json.dumps({"identifier": identifier, "sentence": "Both are red.", "label": label, "left_url": "", **more})


def test_nlvr2_images_are_found_in_every_release_layout(tmp_path: Path) -> None:
    lines = [
        nlvr2_line("dev-8-0-0", "True"),
        nlvr2_line("dev-8-0-1", "False"),
        nlvr2_line("train-9-1-0", "True", directory=37),
        nlvr2_line("dev-7-0-0", "True"),
        "{",
        nlvr2_line("dev-8-0-0", "perhaps"),
    ]
    file = tmp_path / "dev.json"
    file.write_text("\n".join(lines), encoding="utf-8")
    left, right = write_picture(tmp_path / "dev-8-0-img0.png", 1), write_picture(tmp_path / "dev-8-0-img1.png", 2)
    for side in (0, 1):
        write_picture(tmp_path / "train" / "37" / f"train-9-1-img{side}.png", 3 + side)
    assert find_annotations(file) == "nlvr2"
    one, two, three = samples_of(read_annotations(file, "nlvr2", problems := Problems(), Options()))
    members = {name: data for name, data in one.items() if name != "__key__"}
    assert both_images(members) == (left, right)
    assert (statement_of(members).is_true, statement_of(members).id) == (True, "dev-8-0-0")
    assert said(two)["label"] is False
    assert three["__key__"] == "train-9-1-0"
    assert problems.count == 4  # two images of dev-7, a line that is not JSON, a label


def karpathy_file(folder: Path) -> Path:
    images = [
        {"filename": f"COCO_{n}.jpg", "filepath": "val2014", "split": split, "cocoid": 100 + n, "imgid": n,
         "sentences": [{"raw": f"picture {n}, said {k}", "tokens": []} for k in range(2)]}
        for n, split in enumerate(["train", "restval", "val", "test"])
    ]  # fmt: skip
    for n in range(4):
        write_picture(folder / "val2014" / f"COCO_{n}.jpg", n)
    return write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


@pytest.mark.parametrize(("split", "numbers"), [("train", [0, 1]), ("test", [3]), (None, [0, 1, 2, 3])])
def test_karpathy_train_includes_restval(tmp_path: Path, split: str | None, numbers: list[int]) -> None:
    file = karpathy_file(tmp_path)
    assert find_annotations(file) == "karpathy"
    found = samples_of(read_annotations(file, "karpathy", Problems(), Options(split=split)))
    members = [{name: data for name, data in sample.items() if name != "__key__"} for sample in found]
    assert [captions_of(each)[0] for each in members] == [f"picture {n}, said 0" for n in numbers]
    assert len({image_id_of(each) for each in members}) == len(numbers)


def test_trap_09_splits_share_no_image(tmp_path: Path) -> None:
    """Splits are built separately, by name; ViLT's release selects models on test and trains Flickr30k on val."""
    file = karpathy_file(tmp_path)
    keys = [
        {
            sample["__key__"]
            for sample in samples_of(read_annotations(file, "karpathy", Problems(), Options(split=split)))
        }
        for split in ("train", "val", "test")
    ]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 4
    with pytest.raises(DataError, match=r"no image is in split 'dev'; expected one of train \(1\)"):
        read_annotations(file, "karpathy", Problems(), Options(split="dev"))


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    for name, number in (("n02/a/x.jpg", 1), ("n01/y.png", 2), ("n02/z.jpg", 3)):
        write_picture(tmp_path / name, number)
    found = read_annotations(tmp_path, "classes", Problems(), Options())
    assert [class_of(sample, 2) for sample in samples_of(found)] == [0, 1, 1]
    assert found.choices[CLASSES].names == ("n01", "n02")
    with pytest.raises(DataError, match="it has no folder"):
        read_annotations(tmp_path / "n01", "classes", Problems(), Options())


def test_stray_files_and_empty_classes_are_reported(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "dog/2.jpg", "stray.jpg"):
        write_picture(tmp_path / name)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    found = read_annotations(tmp_path, "classes", problems := Problems(), Options())
    assert [class_of(sample, 3) for sample in samples_of(found)] == [1, 2]
    assert problems.skipped == {".txt": 1}
    assert problems.faults == 1
    assert problems.first == [
        f"{tmp_path / 'stray.jpg'}: it is not in a class folder",
        f"{tmp_path / '__MACOSX'}: it is class 0 without an image; if it is not a class, remove it and build again",
    ]


def test_class_names_are_clean_text(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    write_picture(tmp_path / os.fsdecode(b"caf\xe9") / "1.jpg")
    found = read_annotations(tmp_path, "classes", Problems(), Options())
    assert Choices.from_bytes(found.choices[CLASSES].to_bytes(), "list").names == (r"caf\xe9",)
    assert len(samples_of(found)) == 1


@pytest.mark.parametrize("content", [[{"image": "a", "captions": ["b"]}], {"images": [], "annotations": []}, {}])
def test_other_json_is_not_an_annotation_file(tmp_path: Path, content: Any) -> None:
    assert find_annotations(write_json(tmp_path / "a.json", content)) is None
    assert find_annotations(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "images", "kind", "count"),
    [
        ("vqav2/questions.json", "vqav2", "vqa", 3),
        ("vgqa/question_answers.json", "vgqa", "vg_qa", 8),
        ("nlvr2/tiny-dev.json", "nlvr2", "nlvr2", 8),
    ],
)
def test_published_annotations_round_trip_through_shards(
    shared: Path, tmp_path: Path, file: str, images: str, kind: str, count: int
) -> None:
    folder = shared / "data" / "region_features"
    assert find_annotations(folder / file) == kind
    options = Options(images=folder / "images" / images, min_count=1)
    found = read_annotations(folder / file, kind, problems := Problems(), options)  # type: ignore[arg-type]
    write_shards(Storage(), found.samples, str(tmp_path / "shards"))
    read = list(iter_samples(Storage(), str(tmp_path / "shards")))
    assert (len(read), problems.count) == (count, 0)
    for sample in read:
        if kind == "nlvr2":
            assert statement_of(sample.members).id.count("-") == 3
            both_images(sample.members)
        else:
            assert question_of(sample.members).answers
