"""`mome shards` build, index, check and show, from files to shards in a folder and in an S3 bucket."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from jobs.shards import app
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"


def run(*arguments: object, fails: type[Exception] | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails is None:
        assert result.exit_code == 0, result.output + repr(result.exception)
    else:
        assert isinstance(result.exception, fails), result.output + repr(result.exception)
    return result


def facts(result: Result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Write a jsonl of twelve good pairs and one whose image is missing."""
    lines = []
    for number in range(12):
        image = Image.fromarray(np.full((20, 30 + number, 3), 20 * number, np.uint8))
        image.save(tmp_path / f"{number}.{'png' if number % 2 else 'jpg'}")
        name = f"{number}.{'png' if number % 2 else 'jpg'}"
        lines.append(json.dumps({"image": name, "captions": [f"picture {number}", f"a grey one, {number}"]}))
    lines.insert(3, json.dumps({"image": "absent.jpg", "caption": "nothing"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def bucket(s3, monkeypatch) -> str:
    """Return an S3 bucket, which the command reaches through the usual environment variables."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.url()


def test_pairs_are_built_checked_and_shown(pairs, tmp_path):
    out, sheet = tmp_path / "out", tmp_path / "deep" / "sheet.png"
    built = run("build", pairs, out, "--samples-per-shard", 5)
    assert "12 samples in 3 shards" in built.stdout
    assert "1 left out" in built.stdout
    assert "absent.jpg" in built.stderr
    assert "line 4" in built.stderr
    shown = run("show", out, "--samples", 4, "--sheet", sheet)
    assert "picture 0" in shown.stdout
    assert "a grey one, 9" in shown.stdout
    assert "000001.tar" in shown.stdout
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.width > 900


def test_last_line_is_one_json_object(pairs, tmp_path):
    built = facts(run("build", pairs, tmp_path / "out", "--json"))
    assert (built["num_samples"], built["shards"], built["left_out"], built["kind"]) == (12, 1, 1, "jsonl")
    shown = facts(run("show", tmp_path / "out", "--samples", 3, "--json"))
    assert [sample["key"] for sample in shown["samples"]] == ["0", "4", "8"]
    assert shown["samples"][1]["image_size"] == [34, 20]
    assert shown["manifest"] == built["manifest"] == load_manifest(Storage(), str(tmp_path / "out")).digest


def test_shards_in_a_bucket_equal_those_in_a_folder(pairs, tmp_path, bucket):
    there = facts(run("build", pairs, f"{bucket}/pairs", "--samples-per-shard", 5, "--json"))
    here = facts(run("build", pairs, tmp_path / "out", "--samples-per-shard", 5, "--json"))
    assert there["manifest"] == here["manifest"]
    shown, again = (facts(run("show", url, "--json"))["samples"] for url in (f"{bucket}/pairs", tmp_path / "out"))
    assert shown == again


def test_shards_are_replaced_only_with_overwrite(pairs, tmp_path):
    run("build", pairs, tmp_path / "out")
    refused = run("build", pairs, tmp_path / "out", "--limit", 2, fails=DataError)
    assert "--overwrite" in str(refused.exception)
    assert facts(run("build", pairs, tmp_path / "out", "--limit", 2, "--overwrite", "--json"))["num_samples"] == 2


def test_bad_source_leaves_nothing_behind(pairs, tmp_path):
    out = tmp_path / "out"
    run("build", pairs, out, "--strict", "--samples-per-shard", 1, fails=DataError)
    run("build", tmp_path / "absent.jsonl", out, fails=DataError)
    run("build", pairs, out, "--images", tmp_path / "absent", fails=ConfigError)
    (tmp_path / "empty.jsonl").write_text("")
    run("build", tmp_path / "empty.jsonl", out, fails=DataError)
    assert not out.exists() or os.listdir(out) == []
    assert CliRunner().invoke(app, ["build", str(pairs), str(out), "--kind", "word"]).exit_code == 2


def test_show_names_what_does_not_exist(tmp_path):
    assert "absent" in str(run("show", tmp_path / "absent", fails=DataError).exception)
    (tmp_path / "000.tar").write_bytes(b"")
    assert "mome shards index" in str(run("show", tmp_path, fails=DataError).exception)


def test_damaged_image_is_marked_in_show(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    run("build", tmp_path, tmp_path / "out")
    shown = facts(run("show", tmp_path / "out", "--sheet", tmp_path / "sheet.png", "--json"))
    assert "corrupt JPEG" in shown["samples"][0]["fault"]
    assert (tmp_path / "sheet.png").exists()


def test_texts_are_built_and_shown(tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark night. " * 40)
    built = facts(run("build", tmp_path / "book.txt", tmp_path / "out", "--words", 12, "--json"))
    assert built["kind"] == "text"
    assert built["num_samples"] == 20
    run("show", tmp_path / "out", "--sheet", tmp_path / "sheet.png")


def test_img2dataset_tars_are_indexed_in_place(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(buffer, "JPEG")
    record = json.dumps({"caption": "a black square"}).encode()
    members = {"jpg": buffer.getvalue(), "txt": b"a black square", "json": record}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for key in ("000000001", "000000002"):
            for name, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    before = (tmp_path / "00000.tar").read_bytes()
    assert facts(run("index", tmp_path, "--json"))["num_samples"] == 2
    assert (tmp_path / "00000.tar").read_bytes() == before
    shown = facts(run("show", tmp_path, "--json"))["samples"]
    assert shown[0]["captions"] == ["a black square"]
    assert shown[0]["image_size"] == [9, 9]


def test_counts_of_another_tool_need_trust_counts(pairs, tmp_path):
    run("build", pairs, tmp_path / "out", "--samples-per-shard", 5)
    for path in (tmp_path / "out").glob("*.npz"):
        path.unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    for name, count in (("000000", 5), ("000001", 5), ("000002", 2)):
        (tmp_path / "out" / f"{name}_stats.json").write_text(json.dumps({"count": 9, "successes": count}))
    trusted = facts(run("index", tmp_path / "out", "--trust-counts", "--json"))
    assert (trusted["num_samples"], trusted["trusted"]) == (12, 3)
    assert not list((tmp_path / "out").glob("*.npz"))
    assert "counted by another tool" in run("index", tmp_path / "out", "--trust-counts").stdout
    assert facts(run("check", tmp_path / "out", "--json", "--workers", 1))["num_samples"] == 12
    shown = facts(run("show", tmp_path / "out", "--samples", 1, "--json"))["samples"]
    assert shown[0]["captions"] == ["picture 0", "a grey one, 0"]
    assert [path.name for path in (tmp_path / "out").glob("*.npz")] == ["000000.tar.index.npz"]
    whole = facts(run("index", tmp_path / "out", "--json"))
    assert (whole["num_samples"], whole["trusted"]) == (12, 0)


def test_shards_in_a_bucket_are_checked(pairs, bucket):
    run("build", pairs, f"{bucket}/pairs", "--samples-per-shard", 5)
    result = facts(run("check", f"{bucket}/pairs", "--json", "--workers", 1))
    assert (result["num_samples"], result["shards"], result["bad_samples"]) == (12, 3, 0)
    single = facts(run("check", f"{bucket}/pairs/000002.tar", "--json", "--workers", 1))
    assert (single["num_samples"], single["shards"]) == (2, 1)


def test_pipe_urls_are_never_run(tmp_path):
    for command in ("index", "check", "show"):
        run(command, f"pipe:touch {tmp_path}/ran; cat {tmp_path}/x.tar", fails=ConfigError)
    assert os.listdir(tmp_path) == []


def test_real_photos_are_built(tmp_path):
    source = SHARED / "data" / "flickr8k_3k" / "test.jsonl"
    if not source.exists():
        pytest.skip("../shared/data/flickr8k_3k is absent")
    built = facts(run("build", source, tmp_path / "out", "--limit", 30, "--samples-per-shard", 10, "--json"))
    assert (built["num_samples"], built["shards"], built["left_out"]) == (30, 3, 0)
    shown = facts(run("show", tmp_path / "out", "--sheet", tmp_path / "sheet.png", "--json"))["samples"]
    assert all(sample["image_size"] == [224, 224] and len(sample["captions"]) == 5 for sample in shown)


def test_coco_photos_are_built(tmp_path):
    file = SHARED / "data" / "coco_annotations" / "captions_val2017.json"
    images = SHARED / "data" / "coco_ccby_111" / "images"
    if not file.exists() or not images.exists():
        pytest.skip("../shared/data holds no coco_annotations and coco_ccby_111")
    built = facts(run("build", file, tmp_path / "out", "--images", images, "--limit", 20, "--json"))
    assert built["num_samples"] == 20
    assert built["kind"] == "coco"


def test_annotation_format_is_detected_from_content(tmp_path):
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "COCO_val2014_000000000005.jpg")
    question = {"question_id": 50, "image_id": 5, "question": "What colour is it?"}
    answers = {"question_id": 50, "multiple_choice_answer": "grey", "answers": [{"answer": "Grey."}] * 10}
    file = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(json.dumps({"data_subtype": "val2014", "questions": [question]}))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": [answers]}))
    result = facts(run("build", file, tmp_path / "out", "--min-count", 1, "--json"))
    assert (result["kind"], result["num_samples"], result["answers.json"]) == ("vqa", 1, 1)
    assert json.loads((tmp_path / "out" / "answers.json").read_text()) == ["grey"]
    assert "What colour is it?" in run("show", tmp_path / "out").stdout
    assert run("check", tmp_path / "out", "--type", "questions", "--workers", 1).exit_code == 0


def test_folder_per_class_is_built_with_kind_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "train" / name / "a.png")
    result = facts(run("build", tmp_path / "train", tmp_path / "out", "--kind", "classes", "--json"))
    assert (result["num_samples"], result["classes.json"]) == (2, 2)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
