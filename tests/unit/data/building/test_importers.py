"""Importers of folders, jsonl with regions, lists, COCO captions, text and tables, and the writer of shards."""

import errno
import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from pipeline.config.errors import DataError, StorageError
from pipeline.data.building import importers
from pipeline.data.building.importers import find_kind, read_source, write_shards
from pipeline.data.building.inputs import Import, ImportOptions, Problems, Sample
from pipeline.data.contents.regions import parse_regions, regions_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from tests.support.data_stream import data_config, take
from tests.support.http_server import give, serving
from tests.support.shards_command import TABLES, captions_in, read, record_of, save_image, write_lines

LOWEST, LONGEST = 800, 1333  # sides to which torchvision's Faster R-CNN resizes images


def pairs(source: Path, problems: Problems | None = None, **options: Any) -> list[tuple[str, list[str]]]:
    samples = read(source, problems, **options).samples
    return [(sample["__key__"], record_of(sample)["captions"]) for sample in samples]


def test_folders_give_images_with_their_captions_under_unique_keys(tmp_path: Path) -> None:
    data = save_image(tmp_path / "b" / "two words.v2.jpg", 2)
    (tmp_path / "b" / "two words.v2.txt").write_text(" a grey\nthing \n")
    save_image(tmp_path / "a.png", 1)
    save_image(tmp_path / "c.png", 1)
    save_image(tmp_path / ".hidden" / "c.jpg", 3)
    one, same, two = read(tmp_path).samples
    assert (list(one), list(record_of(one)), one["__key__"]) == (["__key__", "png", "json"], ["image_id"], "a")
    assert (two["__key__"], two["jpg"], record_of(two)["captions"]) == ("b_two_words_v2", data, ["a grey thing"])
    assert record_of(one)["image_id"] == record_of(same)["image_id"] != record_of(two)["image_id"]  # equal bytes
    save_image(tmp_path / "names" / "x.jpg")
    for name in ("x.txt", "x.TXT", "x.jpg.Txt", "x.caption", "x.jpg.caption"):
        (tmp_path / "names" / name).write_text("said")
        assert captions_in(read(tmp_path / "names").samples) == [["said"]]
        (tmp_path / "names" / name).unlink()
    for name in ("a/b.jpg", "a_b.jpg", "a b.jpg", "a_b.png"):  # keys stay unique if only punctuation differs
        save_image(tmp_path / "keys" / name)
    assert len({sample["__key__"] for sample in read(tmp_path / "keys").samples}) == 4
    job = Import(tmp_path, "folder")  # took minutes when the counter restarted for each path
    keys = [job.sample(f"照片/{number % 7 * 'é'}", {})["__key__"] for number in range(100_000)]
    assert (len(set(keys)), keys[0], keys[1], keys[-1]) == (100_000, "sample", "sample-2", "sample-100000")


def test_lines_of_one_image_are_merged(tmp_path: Path) -> None:
    for name in "xyz":
        save_image(tmp_path / "images" / f"{name}.jpg", ord(name))
    records = [
        {"image": "images/x.jpg", "captions": ["one", "two"]}, {"image": "images/y.jpg", "caption": "three"},
        {"image": "images/y.jpg", "caption": "four"}, {"image": "images/z.jpg", "captions": ["five"], "image_id": 7},
    ]  # fmt: skip
    assert pairs(write_lines(tmp_path / "l.jsonl", *records)) == [
        ("images_x", ["one", "two"]), ("images_y", ["three", "four"]), ("images_z", ["five"]),
    ]  # fmt: skip
    assert record_of(list(read(tmp_path / "l.jsonl").samples)[2])["image_id"] == 7
    scattered = write_lines(tmp_path / "list.json", [records[1], records[0], records[2]])
    assert captions_in(read(scattered).samples) == [["three", "four"], ["one", "two"]]  # a list is grouped by image
    absent = write_lines(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": "a"}, {"image": "a.jpg", "caption": "b"})
    assert list(read(absent, problems := Problems()).samples) == []
    assert problems.first[1] == f"{absent}, line 2: its image a.jpg is skipped, see {absent}, line 1"


def test_coco_captions_are_grouped_by_image(tmp_path: Path, shared: Path) -> None:
    for number in (1, 2, 3):
        save_image(tmp_path / "val" / f"{number:012d}.jpg", number)
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (3, 1, 2, 9)]
    captions = ((1, "a"), (3, "b\n"), (1, "c"), (9, "absent"), (2, " "))
    annotations = [{"image_id": i, "caption": caption} for i, caption in captions]
    file = write_lines(tmp_path / "captions.json", {"images": images, "annotations": annotations})
    samples = read(file, problems := Problems(), images=tmp_path / "val").samples
    assert [(record_of(s)["image_id"], record_of(s)["captions"]) for s in samples] == [(3, ["b"]), (1, ["a", "c"])]
    for problem, reason in zip(problems.first, ("annotations 4: cannot be", "image 2: it has no c", ""), strict=True):
        assert reason in problem
    images = shared / "data" / "coco_ccby_111" / "images"
    official = shared / "data" / "coco_annotations" / "captions_val2017.json"
    samples = list(read(official, problems := Problems(), images=images).samples)
    assert {record_of(sample)["image_id"] for sample in samples} <= {int(path.stem) for path in images.glob("*.jpg")}
    assert min(map(len, captions_in(samples))) >= 5
    assert len(samples) + problems.count == 5000
    for text in ("[]", "{}", "nothing", '{"images": [{"id": 1}], "annotations": []}'):
        with pytest.raises(DataError, match=r"captions\.json(:| is not).*(COCO|JSON|none of its images)"):
            list(read(write_lines(file, text), Problems(), "coco").samples)


def test_text_is_packed_into_whole_sentences_and_unusable_texts_do_not_affect_others(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "wiki.txt",
        "One two three. Four five!\nSix seven eight nine ten eleven twelve? Thirteen.\n\nNext.",
        " \n = Robert <unk> = \n \n A film @-@ maker of <unk> made 1 @,@ 000 films . \n \n = Life = \n \n He died . ",
    )
    assert [sample["txt"].decode() for sample in read(file, words=5).samples] == [
        "One two three. Four five!", "Six seven eight nine ten", "eleven twelve? Thirteen.", "Next.",
        "A film-maker of made 1,000", "films .", "He died .",
    ]  # fmt: skip
    file.unlink()
    for name, content in (("a", b"\xef\xbb\xbfOne.\n\nTwo.\n"), ("b", b"\n = Heading = \n"), ("d", b"Three.")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfeT\0\x00\xd8T\0")
    samples = read(tmp_path, problems := Problems()).samples
    texts = {sample["__key__"]: sample["txt"] for sample in samples}
    assert texts == {"a-0000000": b"One.", "a-0000001": b"Two.", "d-0000000": b"Three."}
    assert (problems.faults, problems.first[0]) == (2, f"{tmp_path / 'b.txt'}: it contains no text")
    assert "c.txt" in problems.first[1]
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
    absent = tmp_path / "absent"
    for path, kind in ((absent, None), (absent, "jsonl"), (write_lines(tmp_path / "a.docx"), None)):
        with pytest.raises(DataError, match=path.name):
            read(path, kind=kind)


def test_regions_are_stored_with_or_without_image(tmp_path: Path) -> None:
    boxes = np.array([[0, 0, 50, 40], [10, 10, 20, 30]], np.float32)
    np.savez(tmp_path / "a.npz", features=np.ones((2, 4), np.float32), boxes=boxes)
    save_image(tmp_path / "a.jpg")
    named = {"regions": "a.npz", "caption": "two"}
    records = ({"image": "a.jpg", "regions": "a.npz", "captions": ["one"]}, named, named | {"caption": "three"})
    file = write_lines(tmp_path / "lines.jsonl", *records)
    samples = with_picture, alone = [*read(file).samples]
    assert (list(with_picture), list(alone)) == (["__key__", "jpg", "npz", "json"], ["__key__", "npz", "json"])
    assert with_picture["npz"] == alone["npz"] == (tmp_path / "a.npz").read_bytes()
    assert captions_in(samples) == [["one"], ["two", "three"]]
    write_lines(file, named | {"image_size": [60, 80]})  # which the .npz has not
    (sample,) = read(file).samples
    assert parse_regions(sample["npz"]).image_size == (60, 80)
    for changes, reason in (
        ({"regions": "b.npz"}, "cannot be read"),
        ({"image_size": [30, 80]}, r"box 0 .* is outside an image of 80 x 30"),
        *(({"image_size": [height, 80]}, "its image_size is") for height in (10**30, -60, True)),
        ({"image_size": 30}, r"its image_size is 30; expected \[height, width\]"),
    ):
        write_lines(file, named | changes)
        assert list(read(file, problems := Problems()).samples) == []
        assert re.search(reason, "".join(problems.first))
        assert problems.count == 1


def test_real_feature_files_round_trip(shared: Path, tmp_path: Path) -> None:
    """They are features of photographs by Faster R-CNN (`../shared/data`), in the coordinates of resized images."""
    folder, lines = shared / "data" / "region_features", list[Any]()
    for path in sorted((folder / "features_npz").glob("*.npz")):
        picture = next((folder / "images").rglob(path.name.removesuffix(".npz")))
        width, height = Image.open(picture).size
        scale = min(LOWEST / min(width, height), LONGEST / max(width, height))
        files = {"regions": str(path), "image": str(picture), "image_size": [int(height * scale), int(width * scale)]}
        lines.append(files | {"captions": [f"a photograph called {path.name}"]})
    file, ids = write_lines(tmp_path / "lines.jsonl", *lines), set()
    for line, sample in zip(lines, read(file, allow_outside=True).samples, strict=True):
        ids.add(record_of(sample)["image_id"])
        kept = regions_of(sample, 1024, most=40)
        assert len(kept.features) == min(40, len(np.load(line["regions"])["features"]))
        assert 0 <= kept.locations().min() <= kept.locations().max() <= 1
        assert list(kept.image_size) == line["image_size"]
    assert len(ids) == 12
    shards = str(tmp_path / "shards")
    write_shards(Storage(), read(file, allow_outside=True).samples, shards, 5)
    model = {"kind": "imagebert", "width": 32, "layers": 2, "heads": 2, "max_text_length": 12, "region_features": 1024}
    model |= {"max_regions": 40, "dropout": 0.0}
    data = {"streams": 1, "max_bad_rate": 0.0}
    config = data_config({"real": shards}, ("mrfr", "mlm"), "regions", model, data, {"global_batch_size": 12})
    (batch,) = take(config, tokenizer=Tokenizer.train([line["captions"][0] for line in lines], 100))
    assert batch.region_features.shape == (12, 40, 1024)


EXPECTED = [("a", ["A dog, running .", "A cat ."]), ("b", ["Third ."])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("ab"):
        save_image(tmp_path / f"{name}.jpg", number)
    return tmp_path


def test_tables_are_read_as_pairs_whatever_their_captions_contain_by_columns_of_any_name(folder: Path) -> None:
    for name, encoding in product(TABLES, ("utf-8", "utf-16")):
        (folder / name).write_text(TABLES[name], encoding)
        assert (find_kind(folder / name), pairs(folder / name)) == ("table", EXPECTED)
    for caption in ("a cat | a dog", "a cat; a dog", "a cat\ta dog", "cat|dog;cat\tdog"):
        (folder / "t.csv").write_text(f"a.jpg,{caption}\nb.jpg,x\n")
        assert pairs(folder / "t.csv") == [("a", [" ".join(caption.split())]), ("b", ["x"])]
    file = write_lines(folder / "book.txt", "It was a dark night, and nothing moved.", "Then, a sound; and a light.")
    assert find_kind(file) == "text"
    with pytest.raises(DataError, match="--images was given"):
        read(file, images=folder)
    file = write_lines(folder / "odd.csv", "a,b,c", "x,a.jpg,A dog .")
    for image, caption in (("b", "c"), ("2", "3"), ("B", "3")):
        assert pairs(file, image_column=image, caption_column=caption) == [("a", ["A dog ."])]
    unknown = r"no column 'd' \(--image-column\); its columns: a, b, c"
    for image, reason in ((None, r"odd\.csv.*a, b, c.*--image-column"), ("d", unknown)):
        with pytest.raises(DataError, match=reason):
            pairs(file, image_column=image)


def test_unusable_rows_are_reported_with_lines_and_unclosed_quotation_marks_lose_one_line(folder: Path) -> None:
    good = ("b", ["good"])
    rows = ["a.jpg,good", "a.jpg", ",empty", "a.jpg,", "absent.jpg,a", "http://host/x.jpg,a", "b.jpg,good"]
    (folder / "t.csv").write_bytes("\n".join(["image,caption", *rows]).encode() + b"\nb.jpg,caf\xe9\n")
    reasons = {3: "1 columns", 4: "it has no image", 5: "empty", 6: "cannot be read", 7: "URL", 9: "not UTF-8"}
    problems = Problems()
    assert pairs(folder / "t.csv", problems) == [("a", ["good"]), good]
    places = {int(problem.split("line ")[1].split(":")[0]): problem for problem in problems.first}
    assert {n: reasons.get(n, "none") in problem for n, problem in places.items()} == dict.fromkeys(reasons, True)
    for lines, expected, lost in (
        (['a.jpg,"open', "b.jpg,good"], [good], [2]),
        (['a.jpg,"open', 'b.jpg,"good"', "b.jpg,more"], [("b", ["good", "more"])], [2]),
        (['a.jpg,a 5" pipe', "b.jpg,good"], [("a", ['a 5" pipe']), good], []),
        (['a.jpg,"A dog" runs', "b.jpg,good"], [("a", ["A dog runs"]), good], []),
        (['a.jpg,"two', 'lines, ""here"""', "b.jpg,good"], [("a", ['two lines, "here"']), good], []),
        (['a.jpg,"' + "x" * 200_000 + '"', "b.jpg,good"], [good], [2]),
        (["b.jpg,good", 'a.jpg,"open'], [good], [3]),
        (["a.jpg,one\u2028two\x85three", "b.jpg,good"], [("a", ["one two three"]), good], []),
    ):
        (folder / "t.csv").write_text("\n".join(["image,caption", *lines]), "utf-8")
        problems = Problems()
        assert pairs(folder / "t.csv", problems) == expected
        assert [int(problem.split("line ")[1].split(":")[0]) for problem in problems.first] == lost


def write_parquet(file: Path, **columns: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def test_parquet_may_contain_paths_bytes_or_both_and_unusable_rows(folder: Path) -> None:
    data = [(folder / name).read_bytes() for name in ("a.jpg", "b.jpg")]
    texts = [["A dog .", "A cat ."], ["Third ."]]
    for columns in (
        {"image": ["a.jpg", "b.jpg"], "captions": texts, "extra": [1, 2]},
        {"jpg": data, "caption": texts},
        {"image": [{"bytes": image, "path": "x.jpg"} for image in data], "caption": texts},
        {"image": [{"bytes": None, "path": f"{name}.jpg"} for name in "ab"], "TEXT": texts},
    ):
        samples = list(read(write_parquet(folder / "t.parquet", **columns)).samples)
        assert ([sample["jpg"] for sample in samples], captions_in(samples)) == (data, texts)
    for number in range(3):
        write_parquet(folder / "many" / f"{number}.parquet", image=data, caption=["one", "two"])
    assert (find_kind(folder / "many"), len({key for key, _ in pairs(folder / "many")})) == ("parquet", 6)
    file = folder / "t.parquet"  # unusable rows are counted
    texts = pyarrow.array([b"good", b"b", b"c", None, b"caf\xe9", b"\0"], pyarrow.binary()).view(pyarrow.string())
    write_parquet(file, image=[data[0], None, b"text", *data, data[0]], caption=texts)
    assert pairs(file, problems := Problems()) == [("t-0000000", ["good"])]
    assert {problem.split(": ")[0].split(", ")[-1] for problem in problems.first} == {f"row {n}" for n in range(1, 6)}
    write_parquet(file, image=[{"bytes": "a.jpg", "path": "x"}], caption=["a dog"])
    assert (pairs(file, problems := Problems()), "not bytes but a str" in problems.first[0]) == ([], True)
    write_parquet(file, image=[data, [data[0]]], caption=["two images", "one"])
    assert (pairs(file, problems := Problems()), "2 images" in problems.first[0]) == ([("t-0000001", ["one"])], True)


def test_columns_of_hugging_face_are_detected_or_named(folder: Path) -> None:
    images = [{"bytes": (folder / name).read_bytes(), "path": name} for name in ("a.jpg", "b.jpg")]
    nested = [[{"raw": "one", "tokens": ["x"]}, {"raw": "two", "tokens": []}], [{"raw": "three", "tokens": ["y"]}]]
    for texts in (nested, [{"raw": [text["raw"] for text in captions]} for captions in nested]):
        file = write_parquet(folder / "t.parquet", img=images, filepath=["", ""], sentences=texts, score=[0.5, None])
        for column in (None, "sentences.raw", "SENTENCES.RAW"):
            samples = list(read(file, caption_column=column, keep_columns=("score",)).samples)
            assert captions_in(samples) == [["one", "two"], ["three"]]
            assert [record_of(sample).get("score") for sample in samples] == [0.5, None]
    numbered = write_parquet(folder / "n.parquet", image=images, caption_0=["one", "two"], caption_1=["three", None])
    for column in (None, "caption_0, caption_1"):
        assert captions_in(read(numbered, caption_column=column).samples) == [["one", "three"], ["two"]]
    for options, reason in (
        ({"caption_column": "raw"}, r"no column 'raw' \(--caption-column\)"),
        ({"caption_column": "score"}, "--caption-column score has type double; expected text"),
        ({"keep_columns": ("img",)}, "--keep-column img has type struct"),
        ({"keep_columns": ("sentences.raw",)}, "--keep-column sentences.raw has type"),
        ({"keep_columns": ("captions",)}, "--keep-column captions: a sample's JSON uses this name"),
        ({"label_column": "score"}, "--label-column score has type double"),
        ({"split": "dev"}, "--split dev selects nothing"),
    ):
        with pytest.raises(DataError, match=reason):
            pairs(file, **options)
    with pytest.raises(DataError) as error:
        pairs(file, caption_column="raw")
    for listed in ("  sentences.raw: ", "  score: double", "Candidates: --image-column img, --caption-column filepath"):
        assert listed in str(error.value)


def test_classes_of_hugging_face_keep_their_names_and_splits_stay_apart(folder: Path) -> None:
    data = [(folder / name).read_bytes() for name in ("a.jpg", "b.jpg")]
    features = {"label": {"names": ["cat", "tench, Tinca tinca"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (folder / "data").mkdir()
    for name, labels in (
        ("train-00000-of-00002", [1, 0]),
        ("train-00001-of-00002", [-1, 1]),
        ("test-00000-of-00001", [0]),
    ):
        rows = {"img": data[: len(labels)], "label": labels, "split": ["dev", "holdout"][: len(labels)]}
        table = pyarrow.table(rows).replace_schema_metadata(metadata)
        pyarrow.parquet.write_table(table, folder / "data" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"test \(1 file\), train \(2 files\)\. Choose one of them with --split"):
        pairs(folder / "data")
    job = read(folder / "data", problems := Problems(), split="dev")  # a value of the column
    assert [sample["cls"] for sample in job.samples] == [b"0", b"1"]
    assert job.choices == {"classes.json": ("cat", "tench, Tinca tinca")}
    assert "its label is -1; expected 0 to 1" in problems.first[0]
    with pytest.raises(DataError, match=r"no row is in split 'x'; its column 'split' has dev \(3\), holdout \(2\)"):
        pairs(folder / "data", split="x")
    file = write_parquet(folder / "t.parquet", image=data, species=["owl", "bat"])
    job = read(file, label_column="species")
    assert ([sample["cls"] for sample in job.samples], *job.choices.values()) == ([b"1", b"0"], ("bat", "owl"))
    write_parquet(folder / "splits" / "train.parquet", image=data, species=["owl", "bat"])
    write_parquet(folder / "splits" / "test.parquet", image=data[:1], species=["owl"])
    job = read(folder / "splits", label_column="species", split="test")  # numbered as in the other split
    assert ([sample["cls"] for sample in job.samples], *job.choices.values()) == ([b"1"], ("bat", "owl"))


def test_output_of_img2dataset_gives_the_same_samples_as_its_tars_and_failed_rows_are_counted(folder: Path) -> None:
    data = (folder / "a.jpg").read_bytes()
    rows = {
        "url": ["http://h/1", "http://h/2"], "caption": ["A dog .", "gone"], "key": ["000000000", "000000001"],
        "status": ["success", "failed_to_download"], "error_message": [None, "HTTP Error 404: Not Found"],
        "width": [8, None], "jpg": [data, None],
    }  # fmt: skip
    file = write_parquet(folder / "images" / "00000.parquet", **rows)
    (sample,) = read(file.parent, problems := Problems(), keep_columns=("width",)).samples
    assert (sample["__key__"], sample["jpg"], captions_in([sample])) == ("000000000", data, [["A dog ."]])
    assert record_of(sample) | {"url": "http://h/1", "width": 8} == record_of(sample)
    assert (problems.count, problems.faults) == (1, 0)
    assert "row 1: img2dataset has no image (failed_to_download: HTTP Error 404: Not Found)" in problems.first[0]
    del rows["jpg"]
    write_parquet(folder / "tars" / "00000.parquet", **rows)
    write_lines(folder / "tars" / "00000.tar", "")
    with pytest.raises(DataError, match="need no import: run `mome shards index"):
        find_kind(folder / "tars")


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_parquet_is_read_from_a_store_in_rows_and_in_ranges(folder: Path, s3: Any) -> None:
    data = [(folder / name).read_bytes() for name in ("a.jpg", "b.jpg")]
    storage, url = Storage(s3.config), s3.url("set")
    for split, texts in (("train", ["one", "two"]), ("test", ["three", "four"])):
        file = write_parquet(folder / "t.parquet", image=data, text=texts)
        storage.upload(file, join(url, "data", f"{split}-00000-of-00001.parquet"))
    for source, options, expected in (
        (url, {"split": "test"}, ["three", "four"]),
        (join(url, "data/train-00000-of-00001.parquet"), {}, ["one", "two"]),
    ):
        job = read_source(source, "parquet", Problems(strict=True), ImportOptions(**options), storage)
        assert captions_in(job.samples) == [[text] for text in expected]
    with (
        serving(give("PAR1" * 50_000)) as server,  # which ignores ranges
        pytest.raises(StorageError, match=r"does not support ranges\. Download the object"),
    ):
        list(read_source(f"{server.url}/t.parquet", "parquet", Problems()).samples)
    job = read_source(join(url, "none"), "parquet", Problems(), storage=storage)
    with pytest.raises(DataError, match=r"none: no \.parquet file"):
        list(job.samples)
    write_parquet(folder / "t.parquet", image=["a.jpg"], text=["a path"])
    storage.upload(folder / "t.parquet", join(url, "paths.parquet"))
    job = read_source(join(url, "paths.parquet"), "parquet", problems := Problems(), storage=storage)
    assert (list(job.samples), "give the folder of the images" in problems.first[0]) == ([], True)


def text_stream(count: int, then: Exception | None = None) -> Iterator[Sample]:
    for number in range(count):
        yield {"__key__": f"s{number:03d}", "txt": f"text {number}".encode()}
    if then:
        raise then


def test_webdataset_reads_every_written_sample_and_shards_are_replaced_after_all_are_written(
    tmp_path: Path,
) -> None:
    manifest, again = (write_shards(Storage(), text_stream(25), str(tmp_path / name), 10) for name in ("out", "again"))
    shards = {shard.name: shard.samples for shard in manifest.shards}
    assert shards == {"000000.tar": 10, "000001.tar": 10, "000002.tar": 5}
    dataset = webdataset.WebDataset([str(tmp_path / "out" / name) for name in shards], shardshuffle=False)
    assert [sample["txt"].decode() for sample in dataset] == [f"text {i}" for i in range(25)]
    assert load_manifest(Storage(), str(tmp_path / "out")).digest == manifest.digest == again.digest
    url = str(tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite"):
        write_shards(Storage(), text_stream(15), url, 10)
    assert load_manifest(Storage(), url).num_samples == 25
    write_shards(Storage(), text_stream(15), url, 10, overwrite=True)
    assert load_manifest(Storage(), url).num_samples == 15
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == ["000000.tar", "000001.tar"]
    (tmp_path / "000007.tar.index.npz").write_bytes(b"stale")  # no shard: the first upload does not wait

    def stream() -> Iterator[Sample]:
        for number, sample in enumerate(text_stream(6)):
            assert (tmp_path / "000000.tar").exists() == (number >= 2)
            yield sample

    write_shards(Storage(), stream(), str(tmp_path), 2)
    assert not (tmp_path / "000007.tar.index.npz").exists()


def test_failed_import_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, empty, url = tmp_path / "full", tmp_path / "empty", str(tmp_path / "full")
    write_shards(Storage(), text_stream(5), url, 2)
    content = {path.name: path.read_bytes() for path in full.iterdir()}
    for folder, (count, reason) in product((empty, full), ((15, "line 16 is bad"), (0, "no usable sample"))):
        stream = text_stream(count, DataError(reason) if count else None)
        with pytest.raises(DataError, match=reason):
            write_shards(Storage(), stream, str(folder), 5, overwrite=True)
    with pytest.raises(StorageError, match="unreachable"):
        importers.write_tar(tmp_path / "0.tar", text_stream(1, StorageError("the store is unreachable")))
    monkeypatch.setattr(importers, "TarWriter", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
        write_shards(Storage(), text_stream(5), url, overwrite=True)
    assert ({path.name: path.read_bytes() for path in full.iterdir()}, list(empty.glob("*"))) == (content, [])
