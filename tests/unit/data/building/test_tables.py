"""Importers of CSV, the caption files of Flickr8k and Flickr30k, and Parquet."""

import io
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import DataError, MomeError
from pipeline.data.building.importers import find_kind
from pipeline.data.building.inputs import Problems
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.imports import read, record_of, save_image

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

EXPECTED = [("a", ["A dog, running .", "A cat ."]), ("b", ["Third ."])]
TABLES = {
    "captions.txt": 'image,caption\na.jpg,"A dog, running ."\na.jpg,A cat .\nb.jpg,Third .\n',  # Kaggle's Flickr8k
    "unquoted.csv": "image,caption\na.jpg,A dog, running .\na.jpg,A cat .\nb.jpg,Third .\n",
    "Flickr8k.token.txt": "a.jpg#0\tA dog, running .\na.jpg#1\tA cat .\nb.jpg#0\tThird .\n",
    "results_20130124.token": "a.jpg#0\tA dog, running .\na.jpg#1\tA cat .\nb.jpg#0\tThird .\n",
    "results.csv": "image_name| comment_number| comment\n"
    "a.jpg| 0| A dog, running .\na.jpg| 1| A cat .\nb.jpg| 0| Third .\n",
    "open_clip.tsv": 'filepath\ttitle\na.jpg\tA dog, running .\na.jpg\t"A cat ."\nb.jpg\tThird .\n',
    "cc3m.tsv": "A dog, running .\ta.jpg\nA cat .\ta.jpg\nThird .\tb.jpg\n",
    "more.csv": 'id,Text ,Path\n1,"A dog,\nrunning .",a.jpg\n2,A cat .,a.jpg\n\n3,Third .,b.jpg\n',
    "semicolon.csv": "file;caption\na.jpg;A dog, running .\na.jpg;A cat .\nb.jpg;Third .\n",
    "quoted_semicolon.csv": 'caption;file\n"A dog,\nrunning .";a.jpg\n"A cat .";a.jpg\nThird .;b.jpg\n',
    "no_header.csv": 'a.jpg,"A dog, running ."\na.jpg,A cat .\nb.jpg,Third .\n',
    "bom.csv": '\ufeffimage,caption\r\na.jpg,"A dog, running ."\r\na.jpg,A cat .\r\nb.jpg,Third .\r\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("ab"):
        save_image(tmp_path / f"{name}.jpg", number)
    return tmp_path


def pairs(source: Path, problems: Problems | None = None, **options: Any) -> list[tuple[str, list[str]]]:
    samples = read(source, problems, **options).samples
    return [(sample["__key__"], record_of(sample)["captions"]) for sample in samples]


def test_tables_are_read_as_pairs(folder: Path) -> None:
    for name, encoding in product(TABLES, ("utf-8", "utf-16")):
        (folder / name).write_text(TABLES[name], encoding)
        assert (find_kind(folder / name), pairs(folder / name)) == ("table", EXPECTED)


def test_delimiter_detection_ignores_captions_and_prose(folder: Path) -> None:
    for caption in ("a cat | a dog", "a cat; a dog", "a cat\ta dog", "cat|dog;cat\tdog"):
        (folder / "t.csv").write_text(f"a.jpg,{caption}\nb.jpg,x\n")
        assert pairs(folder / "t.csv") == [("a", [" ".join(caption.split())]), ("b", ["x"])]
    file = folder / "book.txt"
    file.write_text("It was a dark night, and nothing moved.\nThen, a sound; and a light.\n")
    assert find_kind(file) == "text"
    with pytest.raises(DataError, match="--images was given"):
        read(file, images=folder)


def test_columns_are_chosen_by_name_or_number(folder: Path) -> None:
    file = folder / "odd.csv"
    file.write_text("a,b,c\nx,a.jpg,A dog .\n")
    with pytest.raises(DataError, match=r"odd\.csv.*a, b, c.*--image-column"):
        pairs(file)
    for image, caption in (("b", "c"), ("2", "3"), ("B", "3")):
        assert pairs(file, image_column=image, caption_column=caption) == [("a", ["A dog ."])]
    with pytest.raises(DataError, match=r"no column 'd' \(--image-column\); its columns: a, b, c"):
        pairs(file, image_column="d")


def test_unusable_rows_are_reported_with_lines(folder: Path) -> None:
    rows = {
        "a.jpg": "1 columns", ",empty": "it has no image", "a.jpg,": "empty", "absent.jpg,a": "cannot be read",
        "http://host/x.jpg,a": "URL",
    }  # fmt: skip
    lines = ["image,caption", "a.jpg,good", *rows, "b.jpg,good"]
    (folder / "t.csv").write_bytes("\n".join(lines).encode() + b"\nb.jpg,caf\xe9\n")
    problems = Problems()
    assert pairs(folder / "t.csv", problems) == [("a", ["good"]), ("b", ["good"])]
    reasons = dict(zip((3, 4, 5, 6, 7, 9), (*rows.values(), "not UTF-8"), strict=True))
    places = [int(problem.split("line ")[1].split(":")[0]) for problem in problems.first]
    assert sorted(places) == list(reasons)
    assert all(reasons[place] in problem for place, problem in zip(places, problems.first, strict=True))


def test_unclosed_quotation_mark_affects_one_line_only(folder: Path) -> None:
    good = ("b", ["good"])
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
        assert pairs(folder / "t.csv", problems := Problems()) == expected
        assert [int(problem.split("line ")[1].split(":")[0]) for problem in problems.first] == lost


def write_parquet(file: Path, **columns: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)
    return file


def test_parquet_may_contain_paths_bytes_or_both(folder: Path) -> None:
    data = [(folder / name).read_bytes() for name in ("a.jpg", "b.jpg")]
    texts = [["A dog .", "A cat ."], ["Third ."]]
    cases = {
        "paths": {"image": ["a.jpg", "b.jpg"], "captions": texts, "extra": [1, 2]},
        "bytes": {"jpg": data, "caption": texts},
        "struct": {"image": [{"bytes": image, "path": "x.jpg"} for image in data], "caption": texts},
        "by_path": {"image": [{"bytes": None, "path": f"{name}.jpg"} for name in "ab"], "TEXT": texts},
    }
    for name, columns in cases.items():
        samples = list(read(write_parquet(folder / f"{name}.parquet", **columns)).samples)
        assert [sample["jpg"] for sample in samples] == data
        assert [record_of(sample)["captions"] for sample in samples] == texts
    text = write_parquet(folder / "text.parquet", image=[{"bytes": "a.jpg", "path": "x"}], caption=["a dog"])
    assert list(read(text, problems := Problems()).samples) == []
    assert "its image is not bytes but a str" in problems.first[0]
    for number in range(3):
        write_parquet(folder / "many" / f"{number}.parquet", image=data, caption=["one", "two"])
    assert find_kind(folder / "many") == "parquet"
    assert len({key for key, _ in pairs(folder / "many")}) == 6


def test_unusable_parquet_rows_are_counted(folder: Path) -> None:
    data = (folder / "a.jpg").read_bytes()
    pictures = [data, None, b"text", data, data, data]
    texts = pyarrow.array([b"good", b"b", b"c", None, b"caf\xe9", b"\0"], pyarrow.binary()).view(pyarrow.string())
    file = write_parquet(folder / "t.parquet", image=pictures, caption=texts)
    problems = Problems()
    assert pairs(file, problems) == [("t-0000000", ["good"])]
    assert {problem.split(": ")[0].split(", ")[-1] for problem in problems.first} == {f"row {n}" for n in range(1, 6)}
    times = pyarrow.array([2**62, 0], pyarrow.timestamp("ms"))  # the first cannot be represented
    file = write_parquet(folder / "t.parquet", image=["a.jpg", "a.jpg"], caption=times)
    problems = Problems()
    assert pairs(file, problems) == []
    assert "row 0: a value cannot be read" in problems.first[0]
    assert "datetime" in problems.first[1]


def test_mutated_tables_raise_only_expected_errors(folder: Path) -> None:
    rng = random.Random(3)
    data = (folder / "a.jpg").read_bytes()
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": [data] * 3, "caption": ["one", "two", "é"]}), buffer)
    tables = {name: text.encode() for name, text in TABLES.items()}
    names = [*rng.choices(list(tables), k=fuzz_rounds(200)), *["t.parquet"] * fuzz_rounds(150)]
    tables["t.parquet"] = buffer.getvalue()
    for name in names:
        (folder / name).write_bytes(mutate(tables[name], rng))
        try:
            rows = pairs(folder / name, Problems()) if find_kind(folder / name) != "text" else []
        except MomeError as error:
            if name not in str(error):
                raise
        else:
            assert all("\ufffd" not in caption and caption.encode() for _, captions in rows for caption in captions)
