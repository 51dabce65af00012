"""`mome shards`, from files to shards in a folder and in an S3 bucket, and its detectors on Ray actors."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.errors import ConfigError, DataError
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage
from tests.support.fine_tuning_data import write_set
from tests.support.pairs import picture
from tests.support.shards_command import facts_of, refuses, run_shards, save_yolos, write_lines


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Write a jsonl of twelve good pairs and one whose image is missing."""
    lines: list[object] = []
    for number in range(12):
        name = f"{number}.{'png' if number % 2 else 'jpg'}"
        Image.fromarray(np.full((20, 30 + number, 3), 20 * number, np.uint8)).save(tmp_path / name)
        lines.append({"image": name, "captions": [f"picture {number}", f"a grey one, {number}"]})
    lines.insert(3, {"image": "absent.jpg", "caption": "nothing"})
    return write_lines(tmp_path / "pairs.jsonl", *lines)


def test_pairs_are_built_shown_and_replaced(pairs: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "out", tmp_path / "deep" / "sheet.png"
    for options, kind in ((("--strict", "--samples-per-shard", 1), DataError), (("--images", sheet), ConfigError)):
        run_shards("build", pairs, out, *options, fails=kind)
        assert not list(out.glob("*")), "a failed command left files behind"
    run_shards("build", pairs, out, "--kind", "word", status=2)
    built = run_shards("build", pairs, out, "--samples-per-shard", 5)
    assert all(text in built.stdout for text in ("12 samples in 3 shards", "1 left out"))
    assert all(text in built.stderr for text in ("absent.jpg", "line 4"))
    shown = run_shards("show", out, "--samples", 4, "--sheet", sheet)
    assert all(text in shown.stdout for text in ("picture 0", "a grey one, 9", "000001.tar"))
    with Image.open(sheet) as image:
        assert (image.format, image.width > 900) == ("PNG", True)
    refuses(DataError, "--overwrite", "build", pairs, out, "--limit", 2)
    facts = facts_of("build", pairs, out, "--overwrite")
    assert (facts["num_samples"], facts["shards"], facts["left_out"], facts["kind"]) == (12, 1, 1, "jsonl")
    listed = facts_of("show", out, "--samples", 3)
    shown = [(sample["key"], sample["image_size"]) for sample in listed["samples"]]
    assert shown == [("0", [30, 20]), ("4", [34, 20]), ("8", [38, 20])]
    assert listed["manifest"] == facts["manifest"] == load_manifest(Storage(), str(out)).digest
    assert facts_of("build", pairs, out, "--limit", 2, "--overwrite")["num_samples"] == 2


def test_shards_in_a_bucket_equal_those_in_a_folder(pairs: Path, tmp_path: Path, s3, monkeypatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    there, here = f"{s3.url()}/pairs", tmp_path / "out"
    built = [facts_of("build", pairs, out, "--samples-per-shard", 5)["manifest"] for out in (there, here)]
    assert built[0] == built[1]
    assert facts_of("show", there)["samples"] == facts_of("show", here)["samples"]
    for url, counts in ((there, (12, 3, 0)), (f"{there}/000002.tar", (2, 1, 0))):
        checked = facts_of("check", url, "--workers", 1)
        assert (checked["num_samples"], checked["shards"], checked["bad_samples"]) == counts


def test_questions_texts_damaged_images_and_photos_are_shown(tmp_path: Path, shared: Path) -> None:
    questions = write_set(tmp_path, "questions", 3)
    assert facts_of("check", questions, "--type", "questions", "--workers", 1)["bad_samples"] == 0
    assert "what colour are the shapes?" in run_shards("show", questions).stdout
    (tmp_path / "book.txt").write_text("It was a dark night. " * 40)
    built = facts_of("build", tmp_path / "book.txt", tmp_path / "texts", "--words", 12)
    assert (built["kind"], built["num_samples"]) == ("text", 20)
    run_shards("show", tmp_path / "texts", "--sheet", tmp_path / "texts.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(picture(1, 64)[:900])
    run_shards("build", tmp_path / "images", tmp_path / "damaged")
    shown = facts_of("show", tmp_path / "damaged", "--sheet", tmp_path / "damaged.png")
    assert "corrupt JPEG" in shown["samples"][0]["fault"]
    photos = shared / "data" / "flickr8k_3k" / "test.jsonl"
    built = facts_of("build", photos, tmp_path / "photos", "--limit", 30, "--samples-per-shard", 10)
    assert (built["num_samples"], built["shards"], built["left_out"]) == (30, 3, 0)
    shown = facts_of("show", tmp_path / "photos", "--sheet", tmp_path / "photos.png")
    assert all(sample["image_size"] == [224, 224] and len(sample["captions"]) == 5 for sample in shown["samples"])


@pytest.mark.slow  # without Ray: unit/jobs/test_shards.py
@pytest.mark.usefixtures("local_ray")
def test_regions_are_equal_for_any_number_of_actors(make_pairs, make_pair, tmp_path: Path) -> None:
    bad = {"jpg": b"\xff\xd8\xff no picture", "json": make_pair(0)["json"]}
    folder, detector = make_pairs("pairs", [4, 3, 5], planted={(1, 2): bad}), save_yolos(tmp_path / "detector")
    one, two = (
        facts_of("regions", folder, tmp_path / str(workers), "--detector", detector, "--workers", workers)
        for workers in (1, 2)
    )
    assert (one["manifest"], one["bad_samples"], two["bad_samples"]) == (two["manifest"], 1, 1)
    (tmp_path / "none").mkdir()
    arguments = ("regions", folder, tmp_path / "out", "--detector", tmp_path / "none")
    refuses(ConfigError, "no detector that transformers can load", *arguments)
