"""`mome shards` reports what it imports, skips and finds, suggests options, and prints foreign tars as clean text."""

import io
import json
import re
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config.errors import ConfigError, DataError, MomeError
from pipeline.data.shards.tar import clean_name
from tests.support.imports import save_image, write_lines
from tests.support.shards_command import facts_of, run_shards

build = partial(run_shards, "build")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write four images, one of them animated and all but the first with captions, and two other files."""
    folder = tmp_path / "data"
    for number, name in enumerate(("a.jpg", "b.png", "c.gif", "sub/d.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        more = {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]} if name == "c.gif" else {}
        Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / name, **more)
        if number:
            (folder / name).with_suffix(".txt").write_text(f"caption {number}")
    write_lines(folder / "x.heic", "text")
    write_lines(folder / "x.md", "text")
    return folder


def lines(path: Path, *names: str) -> Path:
    return write_lines(path, *({"image": name, "caption": "a"} for name in names))


def test_imported_contents_are_counted_and_hints_name_the_option_to_try(images: Path, tmp_path: Path) -> None:
    result = build(images, tmp_path / "out")
    notes = " MB; 1 image without a caption; 1 animated image (first frame)"
    assert all(text in result.stdout for text in ("4 samples in 1 shard at", "4 images, 3 captions", notes))
    assert all(text in result.stderr for text in ("x.heic", "not read: 1 .md"))
    facts = facts_of("build", images, tmp_path / "out", "--overwrite")
    assert facts.items() >= {"images": 4, "captions": 3, "without_caption": 1, "animated": 1, "left_out": 1}.items()
    assert facts["skipped"] == {".md": 1}
    absent = build(lines(tmp_path / "l.jsonl", "x.jpg", "y.jpg"), tmp_path / "none", fails=DataError)
    assert "hint: none of the listed images exists; give the folder" in absent.stderr
    half = build(lines(tmp_path / "l.jsonl", "x.jpg", "y.jpg", "a.jpg"), tmp_path / "half", "--images", images)
    assert "hint: more entries could not be used (2) than were imported (1)" in half.stderr
    for name in ("cat", "dog"):
        save_image(tmp_path / "classes" / name / "1.jpg")
    for folder, is_advised in ((tmp_path / "classes", True), (images, False)):
        assert ("--kind classes" in build(folder, tmp_path / "out", "--overwrite").stderr) == is_advised
    write_lines(tmp_path / "tars" / "0.tar", "")
    assert "mome shards index" in str(build(tmp_path / "tars", tmp_path / "none", fails=DataError).exception)


def test_too_many_missing_entries_leave_nothing(images: Path, tmp_path: Path) -> None:
    file, out = lines(tmp_path / "l.jsonl", "x.jpg", "a.jpg"), tmp_path / "out"
    for fraction in ("49%", "0"):
        refused = build(file, out, "--images", images, "--max-missing", fraction, fails=DataError)
        assert "1 of 2 entries could not be used (50.0%)" in str(refused.exception)
        assert not list(out.glob("*"))
    for fraction in ("50%", "0.5"):
        assert "1 left out" in build(file, out, "--images", images, "--max-missing", fraction, "--overwrite").stdout
    for fraction in ("word", "101%", "-1", "nan", "2", ""):
        refused = build(images, out, "--max-missing", fraction, fails=ConfigError)
        assert f"--max-missing {fraction}: expected a fraction" in str(refused.exception)


def test_options_reach_their_readers_only(images: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("one,two\ndata/a.jpg,said\n")
    build(tmp_path / "t.csv", tmp_path / "out", "--image-column", "one", "--caption-column", "2")
    file = lines(tmp_path / "lists" / "l.jsonl", "../data/a.jpg")
    assert "--allow-outside" in build(file, tmp_path / "out2", fails=DataError).stderr
    build(file, tmp_path / "out2", "--allow-outside")
    options = ("--split", "x"), ("--min-count", 2), ("--listed-only",), ("--image-column", "a"), ("--annotations", "x")
    for option in options:
        refused = build(images, tmp_path / "out3", *option, fails=ConfigError)
        assert re.search(rf"{option[0]} is for --kind .*read as folder", str(refused.exception))


@pytest.fixture
def foreign(tmp_path: Path, make_pair: Any) -> Path:
    """Pack a pair with a Latin-1 name, one whose caption ends in half an emoji, and a pair of symbolic links."""
    (tmp_path / "shards").mkdir()
    pairs = {"café": make_pair(0), "cut": make_pair(1) | {"json": b'{"caption": "a \\ud83d"}'}}
    files = {f"{key}.{extension}": data for key, members in pairs.items() for extension, data in members.items()}
    with tarfile.open(tmp_path / "shards" / "0.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name, data in (files | {"link.jpg": None, "link.json": None}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE, "elsewhere") if data is None else (tarfile.REGTYPE, "")
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return tmp_path / "shards"


def test_index_check_and_show_print_clean_text(foreign: Path, tmp_path: Path, caplog: Any) -> None:
    assert facts_of("index", foreign)["num_samples"] == 2
    assert "2 x symbolic link (the first: link.jpg)" in caplog.text
    facts = facts_of("check", foreign, "--workers", 1, "--report", tmp_path / "bad.jsonl", status=3)
    assert (facts["bad_samples"], facts["skipped"]) == (1, {"symbolic link": 2})
    bad = json.loads((tmp_path / "bad.jsonl").read_text(encoding="utf-8"))
    assert (bad["key"], "lone surrogate" in bad["reason"]) == ("cut", True)
    printed = run_shards("check", foreign, "--workers", 1, status=3).stdout
    assert "skipped, not part of a sample: symbolic link" in printed
    shown = facts_of("show", foreign, "--sheet", tmp_path / "sheet.png")["samples"]
    assert [sample["key"] for sample in shown] == [clean_name(b"caf\xe9"), "cut"]
    run_shards("show", foreign).stdout.encode()


def test_output_replaces_only_an_older_output(foreign: Path, tmp_path: Path) -> None:
    run_shards("index", foreign)
    for command, options, option, status in (("check", ("--workers", 1), "--report", 3), ("show", (), "--sheet", 0)):
        place = tmp_path / command
        for _ in range(2):
            run_shards(command, foreign, *options, option, place, status=status)
        for other in (b"mine", b'{"image": "a.jpg"}\n', (foreign / "0.tar").read_bytes()):
            place.write_bytes(other)
            refused = run_shards(command, foreign, *options, option, place, fails=ConfigError)
            assert re.search(rf"{option}.*did not write", str(refused.exception))
            assert place.read_bytes() == other
        refused = run_shards(command, foreign, *options, option, foreign, fails=MomeError)
        assert re.search("[Ff]older|[Dd]irectory", str(refused.exception))
