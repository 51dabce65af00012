"""Importers of folders, jsonl, COCO captions and plain text; faults are reported with file and line."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.config.errors import DataError
from pipeline.data.building import importers
from pipeline.data.building.files import Problems
from pipeline.data.building.importers import (
    Keys,
    check_writable,
    coco_samples,
    find_kind,
    folder_samples,
    jsonl_samples,
    read_samples,
    text_pieces,
    text_samples,
    write_shards,
)
from pipeline.data.contents.members import captions_of, image_bytes, image_id_of
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage

SHARED = Path(__file__).resolve().parents[4] / ".." / "shared"


def save_image(path: Path, shade: int = 0, kind: str | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(buffer, kind or {".png": "PNG"}.get(path.suffix, "JPEG"))
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def said(sample: dict) -> dict:
    return json.loads(sample["json"])


def test_folders_give_images_with_their_captions(tmp_path):
    data = save_image(tmp_path / "b" / "two words.v2.jpg", 2)
    (tmp_path / "b" / "two words.v2.txt").write_text(" a grey\nthing \n")
    save_image(tmp_path / "a.png", 1)
    save_image(tmp_path / ".hidden" / "c.jpg", 3)
    one, two = folder_samples(tmp_path, problems := Problems())
    assert one["__key__"] == "a"
    assert set(one) == {"__key__", "png", "json"}
    assert "captions" not in said(one)
    assert two["__key__"] == "b_two_words_v2"
    assert two["jpg"] == data
    assert said(two)["captions"] == ["a grey thing"]
    assert problems.count == 0


def test_keys_stay_unique_if_only_punctuation_differs(tmp_path):
    for name in ("a/b.jpg", "a_b.jpg", "a b.jpg", "a_b.png"):
        save_image(tmp_path / name)
    keys = [sample["__key__"] for sample in folder_samples(tmp_path, Problems())]
    assert len(keys) == len(set(keys)) == 4


def test_many_similar_paths_get_unique_keys_quickly(tmp_path):
    key_of = Keys()
    keys = [
        key_of(f"照片/{number % 7 * 'é'}") for number in range(100_000)
    ]  # took minutes when the counter restarted for each path
    assert len(set(keys)) == len(keys)
    assert (keys[0], keys[1], keys[-1]) == ("sample", "sample-2", "sample-100000")


def test_image_extension_follows_the_content(tmp_path):
    save_image(tmp_path / "a.jpg", kind="PNG")
    (sample,) = folder_samples(tmp_path, Problems())
    assert "png" in sample


def test_jsonl_lines_of_one_image_are_merged(tmp_path):
    for name in ("x.jpg", "y.jpg", "z.jpg"):
        save_image(tmp_path / "images" / name, ord(name[0]))
    file = write_lines(
        tmp_path / "train.jsonl",
        {"image": "images/x.jpg", "captions": ["one", "two"]},
        {"image": "images/y.jpg", "caption": "three"},
        {"image": "images/y.jpg", "caption": "four"},
        {"image": "images/z.jpg", "captions": ["five"], "image_id": 7},
    )
    samples = list(jsonl_samples(file, problems := Problems()))
    assert [said(s)["captions"] for s in samples] == [["one", "two"], ["three", "four"], ["five"]]
    assert [s["__key__"] for s in samples] == ["images_x", "images_y", "images_z"]
    assert said(samples[2])["image_id"] == 7
    assert problems.count == 0


def test_equal_bytes_have_equal_image_ids_under_any_name(tmp_path):
    for name, shade in (("a.jpg", 1), ("b.jpg", 1), ("c.jpg", 2)):
        save_image(tmp_path / name, shade)
    a, b, c = (said(sample)["image_id"] for sample in folder_samples(tmp_path, Problems()))
    assert a == b != c


def test_bad_lines_are_reported_and_skipped(tmp_path):
    save_image(tmp_path / "x.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    file = write_lines(
        tmp_path / "bad.jsonl",
        "{not json",
        {"image": "x.jpg"},
        {"image": "x.jpg", "captions": ["", "  "]},
        {"captions": ["a"]},
        {"image": "absent.jpg", "caption": "a"},
        [1, 2],
        {"image": "text.jpg", "caption": "a"},
        {"image": "x.jpg", "captions": ["good", ""]},
    )
    samples = list(jsonl_samples(file, problems := Problems()))
    assert [said(s)["captions"] for s in samples] == [["good"]]
    assert problems.count == 7
    told = sorted(problems.first)
    for number, problem in enumerate(told, 1):
        assert problem.startswith(f"{file}, line {number}: ")
    assert "absent.jpg" in told[4]
    assert "not a JPEG" in told[6]


def test_strict_stops_at_the_first_bad_line(tmp_path):
    file = write_lines(tmp_path / "bad.jsonl", {"image": "absent.jpg", "caption": "a"})
    with pytest.raises(DataError, match=r"line 1.*absent\.jpg"):
        list(jsonl_samples(file, Problems(strict=True)))


def test_first_problems_are_kept_and_all_are_counted(tmp_path):
    file = write_lines(tmp_path / "bad.jsonl", *["{"] * 30)
    assert list(jsonl_samples(file, problems := Problems())) == []
    assert problems.count == 30
    assert len(problems.first) == problems.keep


def test_coco_captions_are_grouped_by_image(tmp_path):
    for number in (1, 2, 3):
        save_image(tmp_path / "val" / f"{number:012d}.jpg", number)
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (3, 1, 2, 9)],
        "annotations": [
            {"image_id": i, "caption": c} for i, c in [(1, "a"), (3, "b\n"), (1, "c"), (9, "absent"), (2, " ")]
        ],
    }
    file = write_lines(tmp_path / "captions.json", content)
    samples = list(coco_samples(file, problems := Problems(), tmp_path / "val"))
    assert [(said(s)["image_id"], said(s)["captions"]) for s in samples] == [(3, ["b"]), (1, ["a", "c"])]
    assert problems.count == 3
    assert "annotations 4: cannot be used" in problems.first[0]
    assert "image 2: it has no caption" in problems.first[1]


@pytest.mark.parametrize("content", ["[]", "{}", "nothing", '{"images": [{"id": 1}], "annotations": []}'])
def test_malformed_coco_files_are_rejected_by_name(tmp_path, content):
    file = write_lines(tmp_path / "captions.json", content)
    with pytest.raises(DataError, match=r"captions\.json(:| is not).*(COCO|JSON|none of its images)"):
        list(coco_samples(file, Problems()))


def test_text_is_packed_into_whole_sentences():
    paragraph = "One two three. Four five! Six seven eight nine ten eleven twelve? Thirteen."
    pieces = list(text_pieces([paragraph, "Next."], 5))
    assert pieces == ["One two three. Four five!", "Six seven eight nine ten", "eleven twelve? Thirteen.", "Next."]
    assert " ".join(pieces) == f"{paragraph} Next."


def test_wikitext_loses_its_headings_and_marks(tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text(
        " \n = Robert <unk> = \n \n A film @-@ maker of <unk> made 1 @,@ 000 films . \n \n = Life = \n \n He died . \n"
    )
    samples = [sample["txt"].decode() for sample in text_samples(file, Problems())]
    assert samples == ["A film-maker of made 1,000 films .", "He died ."]


def test_text_folders_are_read_and_empty_files_reported(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOne.\n\nTwo.\n")
    (tmp_path / "b.txt").write_text("\n = Heading = \n")
    samples = list(text_samples(tmp_path, problems := Problems()))
    assert [(s["__key__"], s["txt"]) for s in samples] == [("a-0000000", b"One."), ("a-0000001", b"Two.")]
    assert problems.first == [f"{tmp_path / 'b.txt'}: it contains no text"]


def test_unreadable_text_does_not_affect_others(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfeT\0\x00\xd8T\0")
    (tmp_path / "c.txt").write_text("Three.")
    samples = list(text_samples(tmp_path, problems := Problems()))
    assert [sample["txt"] for sample in samples] == [b"One.", b"Three."]
    assert problems.faults == 1
    assert "b.txt" in problems.first[0]
    with pytest.raises(DataError, match=r"b\.txt"):
        list(text_samples(tmp_path, Problems(strict=True)))
    with pytest.raises(DataError, match=r"b\.txt"):
        list(text_samples(tmp_path / "b.txt", Problems()))


def test_kind_of_a_source_is_detected(tmp_path):
    save_image(tmp_path / "images" / "deep" / "a.JPG")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    found = [find_kind(write_lines(tmp_path / name)) for name in ("a.jsonl", "a.json", "a.txt")]
    assert found == ["jsonl", "coco", "text"]
    assert (find_kind(tmp_path / "images"), find_kind(tmp_path / "texts")) == ("folder", "text")
    for path in (tmp_path / "absent", write_lines(tmp_path / "a.docx")):
        with pytest.raises(DataError, match=path.name):
            find_kind(path)
    with pytest.raises(DataError, match="absent"):
        read_samples(tmp_path / "absent", "jsonl", Problems())


def text_stream(count: int):
    return ({"__key__": f"s{i:03d}", "txt": f"text {i}".encode()} for i in range(count))


def test_webdataset_reads_every_written_sample_once(tmp_path):
    manifest = write_shards(Storage(), text_stream(25), str(tmp_path / "out"), 10)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("000000.tar", 10), ("000001.tar", 10), ("000002.tar", 5),
    ]  # fmt: skip
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    read = [sample["txt"].decode() for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert read == [f"text {i}" for i in range(25)]
    assert load_manifest(Storage(), str(tmp_path / "out")).digest == manifest.digest


def test_equal_samples_give_equal_shards(tmp_path):
    one, other = (write_shards(Storage(), text_stream(25), str(tmp_path / name), 10) for name in "ab")
    assert one.digest == other.digest


def test_overwriting_removes_old_shards(tmp_path):
    url = str(tmp_path / "out")
    write_shards(Storage(), text_stream(50), url, 10)
    with pytest.raises(DataError, match="--overwrite"):
        check_writable(Storage(), url, overwrite=False)
    check_writable(Storage(), url, overwrite=True)
    write_shards(Storage(), text_stream(15), url, 10)
    assert load_manifest(Storage(), url).num_samples == 15
    assert not (tmp_path / "out" / "000003.tar").exists()


def test_writing_no_sample_keeps_existing_shards(tmp_path):
    url = str(tmp_path / "out")
    write_shards(Storage(), text_stream(5), url)
    with pytest.raises(DataError, match="no usable sample"):
        write_shards(Storage(), iter([]), url)
    assert load_manifest(Storage(), url).num_samples == 5


def test_failing_reader_leaves_no_partial_shards(tmp_path):
    def failing():
        yield from text_stream(15)
        raise DataError("line 16 is bad")

    with pytest.raises(DataError, match="line 16"):
        write_shards(Storage(), failing(), str(tmp_path / "out"), 5)
    assert list((tmp_path / "out").glob("*")) == []
    manifest = write_shards(Storage(), text_stream(5), str(tmp_path / "out"), 2)
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="line 16"):
        write_shards(Storage(), failing(), str(tmp_path / "out"), 5)  # the shards to be replaced are kept
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == content
    assert load_manifest(Storage(), str(tmp_path / "out")) == manifest


def test_full_temporary_disk_is_reported(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importers, "write_tar", full)
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
        write_shards(Storage(), text_stream(5), str(tmp_path / "out"))


def test_imported_samples_are_read_by_training(tmp_path):
    file = SHARED / "data" / "flickr8k_3k" / "val.jsonl"
    if not file.exists():
        pytest.skip("../shared/data/flickr8k_3k is absent")
    record = json.loads(file.read_text().splitlines()[0])
    sample = next(iter(jsonl_samples(file, Problems(strict=True))))
    members = {name: data for name, data in sample.items() if name != "__key__"}
    assert captions_of(members) == record["captions"]
    assert image_bytes(members) == (file.parent / record["image"]).read_bytes()
    assert isinstance(image_id_of(members), int)


def test_official_coco_file_is_read(tmp_path):
    file = SHARED / "data" / "coco_annotations" / "captions_val2017.json"
    images = SHARED / "data" / "coco_ccby_111" / "images"
    if not file.exists() or not images.exists():
        pytest.skip("../shared/data holds no coco_annotations and coco_ccby_111")
    samples = list(coco_samples(file, problems := Problems(), images))
    here = {int(path.stem) for path in images.glob("*.jpg")}
    assert 0 < len(samples) <= len(here)
    assert {said(s)["image_id"] for s in samples} <= here
    assert len(samples) + problems.count == 5000
    assert all(len(said(s)["captions"]) >= 5 for s in samples)
