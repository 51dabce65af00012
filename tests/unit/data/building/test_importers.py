"""Importers of folders, jsonl with regions, lists, COCO captions and plain text, and the writer of shards."""

import errno
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipeline.config.errors import DataError
from pipeline.config.load import validate
from pipeline.data.building import importers
from pipeline.data.building.importers import find_kind, write_shards
from pipeline.data.building.inputs import Import, Problems, Sample
from pipeline.data.contents.regions import parse_regions
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import Loader
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.models.forward import Regions
from pipeline.objectives import batch_groups
from tests.support.imports import captions_in, read, record_of, save_image, write_lines

LOWEST, LONGEST = 800, 1333  # sides to which torchvision's Faster R-CNN resizes images


def test_folders_give_images_with_their_captions(tmp_path: Path) -> None:
    data = save_image(tmp_path / "b" / "two words.v2.jpg", 2)
    (tmp_path / "b" / "two words.v2.txt").write_text(" a grey\nthing \n")
    save_image(tmp_path / "a.png", 1)
    save_image(tmp_path / "c.png", 1)
    save_image(tmp_path / ".hidden" / "c.jpg", 3)
    one, same, two = read(tmp_path).samples
    assert (list(one), list(record_of(one))) == (["__key__", "png", "json"], ["image_id"])
    assert (one["__key__"], two["__key__"]) == ("a", "b_two_words_v2")
    assert (two["jpg"], record_of(two)["captions"]) == (data, ["a grey thing"])
    assert record_of(one)["image_id"] == record_of(same)["image_id"] != record_of(two)["image_id"]  # equal bytes


def test_keys_stay_unique_and_quick_if_only_punctuation_differs(tmp_path: Path) -> None:
    for name in ("a/b.jpg", "a_b.jpg", "a b.jpg", "a_b.png"):
        save_image(tmp_path / name)
    assert len({sample["__key__"] for sample in read(tmp_path).samples}) == 4
    job = Import(tmp_path, "folder")  # took minutes when the counter restarted for each path
    keys = [job.sample(f"照片/{number % 7 * 'é'}", {})["__key__"] for number in range(100_000)]
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
    samples = list(read(write_lines(tmp_path / "l.jsonl", *records)).samples)
    assert captions_in(samples) == [["one", "two"], ["three", "four"], ["five"]]
    assert [sample["__key__"] for sample in samples] == ["images_x", "images_y", "images_z"]
    assert record_of(samples[2])["image_id"] == 7
    scattered = write_lines(tmp_path / "list.json", [records[1], records[0], records[2]])
    assert captions_in(read(scattered).samples) == [["three", "four"], ["one", "two"]]  # a list is grouped by image
    absent = write_lines(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": "a"}, {"image": "a.jpg", "caption": "b"})
    problems = Problems()
    assert list(read(absent, problems).samples) == []
    assert problems.first[1] == f"{absent}, line 2: its image a.jpg is skipped, see {absent}, line 1"


def test_coco_captions_are_grouped_by_image(tmp_path: Path, shared: Path) -> None:
    for number in (1, 2, 3):
        save_image(tmp_path / "val" / f"{number:012d}.jpg", number)
    captions = [(1, "a"), (3, "b\n"), (1, "c"), (9, "absent"), (2, " ")]
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (3, 1, 2, 9)],
        "annotations": [{"image_id": i, "caption": caption} for i, caption in captions],
    }
    file = write_lines(tmp_path / "captions.json", content)
    samples = read(file, problems := Problems(), images=tmp_path / "val").samples
    assert [(record_of(s)["image_id"], record_of(s)["captions"]) for s in samples] == [(3, ["b"]), (1, ["a", "c"])]
    assert problems.count == 3
    assert "annotations 4: cannot be used" in problems.first[0]
    assert "image 2: it has no caption" in problems.first[1]
    images = shared / "data" / "coco_ccby_111" / "images"
    file = shared / "data" / "coco_annotations" / "captions_val2017.json"  # the official file
    samples = list(read(file, problems := Problems(), images=images).samples)
    assert {record_of(sample)["image_id"] for sample in samples} <= {int(path.stem) for path in images.glob("*.jpg")}
    assert samples
    assert len(samples) + problems.count == 5000
    assert all(len(captions) >= 5 for captions in captions_in(samples))

    for text in ("[]", "{}", "nothing", '{"images": [{"id": 1}], "annotations": []}'):
        file = write_lines(tmp_path / "captions.json", text)
        with pytest.raises(DataError, match=r"captions\.json(:| is not).*(COCO|JSON|none of its images)"):
            list(read(file, Problems(), "coco").samples)


def test_text_is_packed_into_whole_sentences(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "wiki.txt",
        "One two three. Four five!\nSix seven eight nine ten eleven twelve? Thirteen.\n\nNext.",
        " \n = Robert <unk> = \n \n A film @-@ maker of <unk> made 1 @,@ 000 films . \n \n = Life = \n \n He died . ",
    )
    assert [sample["txt"].decode() for sample in read(file, words=5).samples] == [
        "One two three. Four five!", "Six seven eight nine ten", "eleven twelve? Thirteen.", "Next.",
        "A film-maker of made 1,000", "films .", "He died .",
    ]  # fmt: skip


def test_unusable_texts_do_not_affect_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffOne.\n\nTwo.\n")
    (tmp_path / "b.txt").write_text("\n = Heading = \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfeT\0\x00\xd8T\0")
    (tmp_path / "d.txt").write_text("Three.")
    samples = list(read(tmp_path, problems := Problems()).samples)
    assert [(sample["__key__"], sample["txt"]) for sample in samples] == [
        ("a-0000000", b"One."), ("a-0000001", b"Two."), ("d-0000000", b"Three."),
    ]  # fmt: skip
    assert problems.first[0] == f"{tmp_path / 'b.txt'}: it contains no text"
    assert (problems.faults, "c.txt" in problems.first[1]) == (2, True)
    (tmp_path / "b.txt").unlink()
    for source, strict in ((tmp_path, True), (tmp_path / "c.txt", False)):
        with pytest.raises(DataError, match=r"c\.txt"):
            list(read(source, Problems(strict=strict), "text").samples)


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
        read(tmp_path / "absent", kind="jsonl")


def test_regions_are_stored_with_or_without_image(tmp_path: Path) -> None:
    boxes = np.array([[0, 0, 50, 40], [10, 10, 20, 30]], np.float32)
    np.savez(tmp_path / "a.npz", features=np.ones((2, 4), np.float32), boxes=boxes)
    save_image(tmp_path / "a.jpg")
    named = {"regions": "a.npz", "caption": "two"}
    records = ({"image": "a.jpg", "regions": "a.npz", "captions": ["one"]}, named, named | {"caption": "three"})
    file = write_lines(tmp_path / "lines.jsonl", *records)
    with_picture, alone = read(file).samples
    assert (list(with_picture), list(alone)) == (["__key__", "jpg", "npz", "json"], ["__key__", "npz", "json"])
    assert with_picture["npz"] == alone["npz"] == (tmp_path / "a.npz").read_bytes()
    assert record_of(alone)["captions"] == ["two", "three"]
    write_lines(file, named | {"image_size": [60, 80]})  # which the .npz has not
    (sample,) = read(file).samples
    assert parse_regions(sample["npz"]).image_size == (60, 80)
    for changes, reason in (
        ({"regions": "b.npz"}, "cannot be read"),
        ({"image_size": [30, 80]}, r"box 0 .* is outside an image of 80 x 30"),
        ({"image_size": [10**30, 80]}, "its image_size is"),
        ({"image_size": [-60, 80]}, "its image_size is"),
        ({"image_size": [True, 80]}, "its image_size is"),
        ({"image_size": 30}, r"its image_size is 30; expected \[height, width\]"),
    ):
        write_lines(file, named | changes)
        assert list(read(file, problems := Problems()).samples) == []
        assert problems.count == 1
        assert re.search(reason, problems.first[0])


def test_real_feature_files_round_trip(shared: Path, tmp_path: Path) -> None:
    """Features of photographs by Faster R-CNN (`../shared/data`) pass through shards and loader into a model."""
    folder = shared / "data" / "region_features"
    lines = []
    for path in sorted((folder / "features_npz").glob("*.npz")):
        picture = next((folder / "images").rglob(path.name.removesuffix(".npz")))
        width, height = Image.open(picture).size
        scale = min(LOWEST / min(width, height), LONGEST / max(width, height))
        size = [int(height * scale), int(width * scale)]
        captions = [f"a photograph called {path.name}"]
        lines.append({"regions": str(path), "image": str(picture), "image_size": size, "captions": captions})
    assert len(lines) == 12
    file = write_lines(tmp_path / "lines.jsonl", *lines)
    write_shards(Storage(), read(file, allow_outside=True).samples, str(tmp_path / "shards"), 5)
    model = {
        "kind": "imagebert", "width": 32, "layers": 2, "heads": 2, "max_text_length": 12, "region_features": 1024,
        "max_regions": 40, "dropout": 0.0,
    }  # fmt: skip
    stage = {
        "name": "regions", "sources": {"real": 1.0}, "steps": 9, "global_batch_size": 12, "max_text_length": 12,
        "objectives": {"mrfr": {}, "mlm": {}},
    }  # fmt: skip
    sources = {"real": {"shards": str(tmp_path / "shards"), "type": "regions"}}
    data = {"streams": 1, "max_bad_rate": 0.0}
    config = validate({"name": "real", "model": model, "sources": sources, "data": data, "stages": [stage]}, "real")
    tokenizer = Tokenizer.train([line["captions"][0] for line in lines], 100)
    with closing(
        Loader(config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, 0, 1)
    ) as loader:
        (batch,) = islice(loader.batches(0), 1)
    assert batch.region_features.shape == (12, 40, 1024)
    kept = sorted(batch.region_keep.sum(dim=1).tolist())
    assert kept == sorted(min(40, len(np.load(line["regions"])["features"])) for line in lines)
    assert 0 <= batch.region_location.min() <= batch.region_location.max() <= 1
    assert len(set(batch.image_id.tolist())) == 12
    with torch.no_grad():
        region_embedding = build_model(config.model, tokenizer.size).eval().region_embedding
        regions = Regions(batch.region_features, batch.region_location, batch.region_keep)
        assert region_embedding(regions, torch.zeros(32)).isfinite().all()


def text_stream(count: int) -> Iterator[Sample]:
    return ({"__key__": f"s{i:03d}", "txt": f"text {i}".encode()} for i in range(count))


def test_webdataset_reads_every_written_sample_once(tmp_path: Path) -> None:
    manifest = write_shards(Storage(), text_stream(25), str(tmp_path / "out"), 10)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("000000.tar", 10), ("000001.tar", 10), ("000002.tar", 5),
    ]  # fmt: skip
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    texts = [sample["txt"].decode() for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert texts == [f"text {i}" for i in range(25)]
    again = write_shards(Storage(), text_stream(25), str(tmp_path / "again"), 10)
    assert load_manifest(Storage(), str(tmp_path / "out")).digest == manifest.digest == again.digest


def test_overwriting_replaces_shards_after_all_are_written(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    write_shards(Storage(), text_stream(50), url, 10)
    with pytest.raises(DataError, match="--overwrite"):
        write_shards(Storage(), text_stream(15), url, 10)
    assert load_manifest(Storage(), url).num_samples == 50
    write_shards(Storage(), text_stream(15), url, 10, overwrite=True)
    assert load_manifest(Storage(), url).num_samples == 15
    assert not (tmp_path / "out" / "000003.tar").exists()
    (tmp_path / "000007.tar.index.npz").write_bytes(b"stale")  # no shard: the first upload does not wait

    def stream() -> Iterator[Sample]:
        for number, sample in enumerate(text_stream(6)):
            assert (tmp_path / "000000.tar").exists() == (number >= 2)
            yield sample

    write_shards(Storage(), stream(), str(tmp_path), 2)
    assert not (tmp_path / "000007.tar.index.npz").exists()


def failing_stream() -> Iterator[Sample]:
    yield from text_stream(15)
    raise DataError("line 16 is bad")


def test_failed_import_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, empty, url = tmp_path / "full", tmp_path / "empty", str(tmp_path / "full")
    write_shards(Storage(), text_stream(5), url, 2)
    content = {path.name: path.read_bytes() for path in full.iterdir()}
    for stream, reason in ((failing_stream, "line 16"), (lambda: iter([]), "no usable sample")):
        for folder in (empty, full):
            with pytest.raises(DataError, match=reason):
                write_shards(Storage(), stream(), str(folder), 5, overwrite=True)
    no_space = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(importers, "write_tar", Mock(side_effect=no_space))
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
        write_shards(Storage(), text_stream(5), url, overwrite=True)
    assert {path.name: path.read_bytes() for path in full.iterdir()} == content
    assert list(empty.glob("*")) == []
