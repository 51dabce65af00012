"""`mome shards build` reports what it imported and skipped, and suggests options when no entry matches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.shards import app
from pipeline.config.errors import ConfigError, DataError


def build(*arguments: object, fails: type[Exception] | None = None) -> Any:
    result = CliRunner().invoke(app, ["build", *(str(argument) for argument in arguments)])
    if fails is None:
        assert result.exception is None, repr(result.exception)
    else:
        assert isinstance(result.exception, fails), repr(result.exception)
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.jpg", "b.png", "c.gif", "sub/d.jpg")):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (8, 6), (number, 0, 0))
        more = {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]} if name == "c.gif" else {}
        image.save(tmp_path / "data" / name, **more)
        if number:
            (tmp_path / "data" / name).with_suffix(".txt").write_text(f"caption {number}")
    (tmp_path / "data" / "x.heic").write_bytes(b"picture")
    (tmp_path / "data" / "x.md").write_text("text")
    return tmp_path / "data"


def test_imported_contents_are_counted(folder: Path, tmp_path: Path) -> None:
    result = build(folder, tmp_path / "out")
    assert "4 samples in 1 shard at" in result.stdout
    assert "4 images, 3 captions" in result.stdout
    assert " MB; 1 image without a caption; 1 animated image (first frame)" in result.stdout
    assert "x.heic" in result.stderr
    assert "not read: 1 .md" in result.stderr
    facts = json.loads(build(folder, tmp_path / "out", "--overwrite", "--json").stdout.splitlines()[-1])
    assert {name: facts[name] for name in ("images", "captions", "without_caption", "animated", "left_out")} == {
        "images": 4, "captions": 3, "without_caption": 1, "animated": 1, "left_out": 1,
    }  # fmt: skip
    assert facts["skipped"] == {".md": 1}


def lines(path: Path, names: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"image": name, "caption": "a"}) for name in names))
    return path


def test_hints_name_the_option_to_try(folder: Path, tmp_path: Path) -> None:
    absent = build(lines(tmp_path / "l.jsonl", ["x.jpg", "y.jpg"]), tmp_path / "out", fails=DataError)
    assert "hint: none of the listed images exists; give the folder" in absent.stderr
    half = build(lines(tmp_path / "l.jsonl", ["x.jpg", "y.jpg", "a.jpg"]), tmp_path / "out", "--images", folder)
    assert "hint: more entries could not be used (2) than were imported (1)" in half.stderr
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "classes" / name / "1.jpg")
    assert "--kind classes" in build(tmp_path / "classes", tmp_path / "out2").stderr
    assert "--kind classes" not in build(folder, tmp_path / "out3").stderr


@pytest.mark.parametrize(
    ("share", "passes"), [("50%", True), ("0.5", True), ("49%", False), ("0", False), ("1%", False)]
)
def test_too_many_missing_entries_leave_nothing(folder: Path, tmp_path: Path, share: str, passes: bool) -> None:
    file = lines(tmp_path / "l.jsonl", ["x.jpg", "a.jpg"])
    out = tmp_path / "out"
    result = build(file, out, "--images", folder, "--max-missing", share, fails=None if passes else DataError)
    if passes:
        assert "1 left out" in result.stdout
    else:
        assert "1 of 2 entries could not be used (50.0%)" in str(result.exception)
        assert not list(out.glob("*"))


@pytest.mark.parametrize("share", ["word", "101%", "-1", "nan", "2", ""])
def test_invalid_fraction_is_rejected(folder: Path, tmp_path: Path, share: str) -> None:
    assert "--max-missing" in str(build(folder, tmp_path / "out", "--max-missing", share, fails=ConfigError).exception)


def test_columns_and_outside_images_reach_the_readers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("one,two\ndata/a.jpg,said\n")
    build(tmp_path / "t.csv", tmp_path / "out", "--image-column", "one", "--caption-column", "2")
    (tmp_path / "lists").mkdir()
    file = lines(tmp_path / "lists" / "l.jsonl", ["../data/a.jpg"])
    assert "--allow-outside" in build(file, tmp_path / "out2", fails=DataError).stderr
    build(file, tmp_path / "out2", "--allow-outside")
    (tmp_path / "book.txt").write_text("It was a dark night.\n")
    refused = build(tmp_path / "book.txt", tmp_path / "out3", "--images", folder, fails=DataError)
    assert "--images was given" in str(refused.exception)


@pytest.mark.parametrize(
    "option",
    [("--split", "test"), ("--min-count", 2), ("--listed-only",), ("--image-column", "a"), ("--annotations", "x")],
)
def test_option_of_another_format_is_rejected(folder: Path, tmp_path: Path, option: tuple[object, ...]) -> None:
    refused = build(folder, tmp_path / "out", *option, fails=ConfigError)
    assert f"{option[0]} is for --kind" in str(refused.exception)
    assert "read as folder" in str(refused.exception)


def test_building_from_tars_suggests_index(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    assert "mome shards index" in str(build(tmp_path / "tars", tmp_path / "out", fails=DataError).exception)
