"""Importers of folders, jsonl, lists, COCO captions and plain text, and the writer of shards."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset

from pipeline.config.errors import DataError
from pipeline.data.building import importers
from pipeline.data.building.files import ImportOptions, Keys, Problems, Sample
from pipeline.data.building.importers import (
    check_writable,
    coco_samples,
    find_kind,
    folder_samples,
    jsonl_samples,
    read_source,
    text_pieces,
    text_samples,
    write_shards,
)
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage
from tests.support.imports import captions_in, record_of, save_image, write_lines


def test_folders_give_images_with_their_captions(tmp_path: Path) -> None:
    data = save_image(tmp_path / "b" / "two words.v2.jpg", 2)
    (tmp_path / "b" / "two words.v2.txt").write_text(" a grey\nthing \n")
    save_image(tmp_path / "a.png", 1)
    save_image(tmp_path / ".hidden" / "c.jpg", 3)
    one, two = folder_samples(tmp_path, problems := Problems())
    assert list(one) == ["__key__", "png", "json"]
    assert list(record_of(one)) == ["image_id"]
    assert (one["__key__"], two["__key__"]) == ("a", "b_two_words_v2")
    assert two["jpg"] == data
    assert record_of(two)["captions"] == ["a grey thing"]
    assert problems.count == 0


def test_keys_stay_unique_if_only_punctuation_differs(tmp_path: Path) -> None:
    for name in ("a/b.jpg", "a_b.jpg", "a b.jpg", "a_b.png"):
        save_image(tmp_path / name)
    assert len({sample["__key__"] for sample in folder_samples(tmp_path, Problems())}) == 4


def test_many_similar_paths_get_unique_keys_quickly() -> None:
    key_of = Keys()  # took minutes when the counter restarted for each path
    keys = [key_of(f"照片/{number % 7 * 'é'}") for number in range(100_000)]
    assert len(set(keys)) == len(keys)
    assert (keys[0], keys[1], keys[-1]) == ("sample", "sample-2", "sample-100000")


def test_lines_of_one_image_are_merged(tmp_path: Path) -> None:
    for name in "xyz":
        save_image(tmp_path / "images" / f"{name}.jpg", ord(name))
    records = [
        {"image": "images/x.jpg", "captions": ["one", "two"]},
        {"image": "images/y.jpg", "caption": "three"},
        {"image": "images/y.jpg", "caption": "four"},
        {"image": "images/z.jpg", "captions": ["five"], "image_id": 7},
    ]
    samples = list(jsonl_samples(write_lines(tmp_path / "l.jsonl", *records), Problems(strict=True)))
    assert captions_in(samples) == [["one", "two"], ["three", "four"], ["five"]]
    assert [sample["__key__"] for sample in samples] == ["images_x", "images_y", "images_z"]
    assert record_of(samples[2])["image_id"] == 7
    scattered = write_lines(tmp_path / "list.json", [records[1], records[0], records[2]])
    merged = read_source(scattered, find_kind(scattered), Problems(strict=True)).samples
    assert captions_in(merged) == [["three", "four"], ["one", "two"]]  # a list is grouped by image


def test_equal_bytes_have_equal_image_ids_under_any_name(tmp_path: Path) -> None:
    for name, shade in (("a.jpg", 1), ("b.jpg", 1), ("c.jpg", 2)):
        save_image(tmp_path / name, shade)
    a, b, c = (record_of(sample)["image_id"] for sample in folder_samples(tmp_path, Problems()))
    assert a == b != c


def test_coco_captions_are_grouped_by_image(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save_image(tmp_path / "val" / f"{number:012d}.jpg", number)
    captions = [(1, "a"), (3, "b\n"), (1, "c"), (9, "absent"), (2, " ")]
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (3, 1, 2, 9)],
        "annotations": [{"image_id": i, "caption": caption} for i, caption in captions],
    }
    file = write_lines(tmp_path / "captions.json", content)
    samples = coco_samples(file, problems := Problems(), ImportOptions(images=tmp_path / "val"))
    assert [(record_of(s)["image_id"], record_of(s)["captions"]) for s in samples] == [(3, ["b"]), (1, ["a", "c"])]
    assert problems.count == 3
    assert "annotations 4: cannot be used" in problems.first[0]
    assert "image 2: it has no caption" in problems.first[1]


@pytest.mark.parametrize("content", ["[]", "{}", "nothing", '{"images": [{"id": 1}], "annotations": []}'])
def test_malformed_coco_files_are_rejected_by_name(tmp_path: Path, content: str) -> None:
    file = write_lines(tmp_path / "captions.json", content)
    with pytest.raises(DataError, match=r"captions\.json(:| is not).*(COCO|JSON|none of its images)"):
        list(coco_samples(file, Problems()))


def test_text_is_packed_into_whole_sentences() -> None:
    paragraph = "One two three. Four five! Six seven eight nine ten eleven twelve? Thirteen."
    pieces = list(text_pieces([paragraph, "Next."], 5))
    assert pieces == ["One two three. Four five!", "Six seven eight nine ten", "eleven twelve? Thirteen.", "Next."]


def test_wikitext_loses_its_headings_and_marks(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(
        " \n = Robert <unk> = \n \n A film @-@ maker of <unk> made 1 @,@ 000 films . \n \n = Life = \n \n He died . \n"
    )
    samples = [sample["txt"].decode() for sample in text_samples(tmp_path / "wiki.txt", Problems())]
    assert samples == ["A film-maker of made 1,000 films .", "He died ."]


def test_unusable_texts_do_not_affect_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffOne.\n\nTwo.\n")
    (tmp_path / "b.txt").write_text("\n = Heading = \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfeT\0\x00\xd8T\0")
    (tmp_path / "d.txt").write_text("Three.")
    samples = list(text_samples(tmp_path, problems := Problems()))
    assert [(sample["__key__"], sample["txt"]) for sample in samples] == [
        ("a-0000000", b"One."), ("a-0000001", b"Two."), ("d-0000000", b"Three."),
    ]  # fmt: skip
    assert problems.first[0] == f"{tmp_path / 'b.txt'}: it contains no text"
    assert (problems.faults, "c.txt" in problems.first[1]) == (2, True)
    (tmp_path / "b.txt").unlink()
    for source, strict in ((tmp_path, True), (tmp_path / "c.txt", False)):
        with pytest.raises(DataError, match=r"c\.txt"):
            list(text_samples(source, Problems(strict=strict)))


def test_kind_of_a_source_is_detected(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "deep" / "a.JPG")
    write_lines(tmp_path / "texts" / "a.txt", "a")
    contents = {"a.jsonl": "", "a.json": "", "a.txt": "", "l.json": '{"image": "a"}\n{"image": "b"}'}
    kinds = [find_kind(write_lines(tmp_path / name, text)) for name, text in contents.items()]
    assert kinds == ["jsonl", "coco", "text", "jsonl"]
    assert (find_kind(tmp_path / "images"), find_kind(tmp_path / "texts")) == ("folder", "text")
    for path in (tmp_path / "absent", write_lines(tmp_path / "a.docx")):
        with pytest.raises(DataError, match=path.name):
            find_kind(path)
    with pytest.raises(DataError, match="absent"):
        read_source(tmp_path / "absent", "jsonl", Problems())


def text_stream(count: int) -> Iterator[Sample]:
    return ({"__key__": f"s{i:03d}", "txt": f"text {i}".encode()} for i in range(count))


def test_webdataset_reads_every_written_sample_once(tmp_path: Path) -> None:
    manifest = write_shards(Storage(), text_stream(25), str(tmp_path / "out"), 10)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("000000.tar", 10), ("000001.tar", 10), ("000002.tar", 5),
    ]  # fmt: skip
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    read = [sample["txt"].decode() for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert read == [f"text {i}" for i in range(25)]
    again = write_shards(Storage(), text_stream(25), str(tmp_path / "again"), 10)
    assert load_manifest(Storage(), str(tmp_path / "out")).digest == manifest.digest == again.digest


def test_overwriting_removes_old_shards(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    write_shards(Storage(), text_stream(50), url, 10)
    with pytest.raises(DataError, match="--overwrite"):
        check_writable(Storage(), url, overwrite=False)
    check_writable(Storage(), url, overwrite=True)
    write_shards(Storage(), text_stream(15), url, 10)
    assert load_manifest(Storage(), url).num_samples == 15
    assert not (tmp_path / "out" / "000003.tar").exists()


def test_stale_sidecars_do_not_delay_the_first_upload(tmp_path: Path) -> None:
    """Only shards that are replaced wait in temporary files until all tars are written."""
    (tmp_path / "000007.tar.index.npz").write_bytes(b"stale")

    def stream() -> Iterator[Sample]:
        for number, sample in enumerate(text_stream(6)):
            assert (tmp_path / "000000.tar").exists() == (number >= 2)
            yield sample

    write_shards(Storage(), stream(), str(tmp_path), 2)
    assert not (tmp_path / "000007.tar.index.npz").exists()


def failing_stream() -> Iterator[Sample]:
    yield from text_stream(15)
    raise DataError("line 16 is bad")


@pytest.mark.parametrize(("stream", "reason"), [(failing_stream, "line 16"), (lambda: iter([]), "no usable sample")])
def test_failed_import_changes_nothing(tmp_path: Path, stream, reason: str) -> None:
    url = tmp_path / "out"
    with pytest.raises(DataError, match=reason):
        write_shards(Storage(), stream(), str(url), 5)
    assert list(url.glob("*")) == []
    write_shards(Storage(), text_stream(5), str(url), 2)
    content = {path.name: path.read_bytes() for path in url.iterdir()}
    with pytest.raises(DataError, match=reason):
        write_shards(Storage(), stream(), str(url), 5)
    assert {path.name: path.read_bytes() for path in url.iterdir()} == content


def test_full_temporary_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importers, "write_tar", full)
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
        write_shards(Storage(), text_stream(5), str(tmp_path / "out"))


def test_official_coco_file_is_read(shared: Path) -> None:
    images = shared / "data" / "coco_ccby_111" / "images"
    file = shared / "data" / "coco_annotations" / "captions_val2017.json"
    samples = list(coco_samples(file, problems := Problems(), ImportOptions(images=images)))
    assert samples
    assert {record_of(sample)["image_id"] for sample in samples} <= {int(path.stem) for path in images.glob("*.jpg")}
    assert len(samples) + problems.count == 5000
    assert all(len(captions) >= 5 for captions in captions_in(samples))
