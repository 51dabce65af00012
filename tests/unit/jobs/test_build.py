"""`mome shards build` reports what it imported and skipped, and suggests options when no entry matches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config.errors import ConfigError, DataError
from tests.support.imports import save_image, write_lines
from tests.support.shards_command import facts_of, run_shards


def build(*arguments: object, fails: type[Exception] | None = None) -> Any:
    return run_shards("build", *arguments, fails=fails)


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
    facts = facts_of("build", folder, tmp_path / "out", "--overwrite")
    assert {name: facts[name] for name in ("images", "captions", "without_caption", "animated", "left_out")} == {
        "images": 4, "captions": 3, "without_caption": 1, "animated": 1, "left_out": 1,
    }  # fmt: skip
    assert facts["skipped"] == {".md": 1}


def lines(path: Path, names: list[str]) -> Path:
    return write_lines(path, *({"image": name, "caption": "a"} for name in names))


def test_hints_name_the_option_to_try(folder: Path, tmp_path: Path) -> None:
    absent = build(lines(tmp_path / "l.jsonl", ["x.jpg", "y.jpg"]), tmp_path / "out", fails=DataError)
    assert "hint: none of the listed images exists; give the folder" in absent.stderr
    half = build(lines(tmp_path / "l.jsonl", ["x.jpg", "y.jpg", "a.jpg"]), tmp_path / "out", "--images", folder)
    assert "hint: more entries could not be used (2) than were imported (1)" in half.stderr
    for name in ("cat", "dog"):
        save_image(tmp_path / "classes" / name / "1.jpg")
    assert "--kind classes" in build(tmp_path / "classes", tmp_path / "out2").stderr
    assert "--kind classes" not in build(folder, tmp_path / "out3").stderr


@pytest.mark.parametrize(("share", "passes"), [("50%", True), ("0.5", True), ("49%", False), ("0", False)])
def test_too_many_missing_entries_leave_nothing(folder: Path, tmp_path: Path, share: str, passes: bool) -> None:
    file = lines(tmp_path / "l.jsonl", ["x.jpg", "a.jpg"])
    out = tmp_path / "out"
    result = build(file, out, "--images", folder, "--max-missing", share, fails=None if passes else DataError)
    if passes:
        assert "1 left out" in result.stdout
    else:
        assert "1 of 2 entries could not be used (50.0%)" in str(result.exception)
        assert not list(out.glob("*"))


def test_invalid_fraction_is_rejected(folder: Path, tmp_path: Path) -> None:
    for share in ("word", "101%", "-1", "nan", "2", ""):
        refused = build(folder, tmp_path / "out", "--max-missing", share, fails=ConfigError)
        assert f"--max-missing {share}: expected a fraction" in str(refused.exception)


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


def test_option_of_another_format_is_rejected(folder: Path, tmp_path: Path) -> None:
    for option in (
        ("--split", "x"),
        ("--min-count", 2),
        ("--listed-only",),
        ("--image-column", "a"),
        ("--annotations", "x"),
    ):
        refused = build(folder, tmp_path / "out", *option, fails=ConfigError)
        assert re.search(rf"{option[0]} is for --kind .*read as folder", str(refused.exception))


def test_building_from_tars_suggests_index(tmp_path: Path) -> None:
    write_lines(tmp_path / "tars" / "0.tar", "")
    assert "mome shards index" in str(build(tmp_path / "tars", tmp_path / "out", fails=DataError).exception)
