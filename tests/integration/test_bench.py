"""`mome bench`: each command measures a tiny load, and the loaders it compares do the same work."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from jobs.bench import PEERS as TOLD_PEERS
from jobs.bench import app, pillow
from jobs.bench.contender import Job
from jobs.bench.cpu import tree_cpu_seconds
from jobs.bench.loader import run_job
from jobs.bench.peers import PEERS
from jobs.bench.photos import HEIGHT, WIDTH, draw_samples, write_photos
from pipeline.config.errors import ConfigError, DataError, RunFailed
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples import augment
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage

BURN = "import time\nwhile time.process_time() < {seconds}: pass"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def facts(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def photos(tmp_path, make_pair) -> str:
    """A folder of twelve pictures with their captions."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(12):
        members = make_pair(number)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(members["jpg"])
        lines.append(json.dumps({"image": f"images/{number}.jpg", **json.loads(members["json"])}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return str(tmp_path)


@pytest.fixture
def job(tmp_path, photos) -> Job:
    """Thirty-two of them in shards, with a vocabulary of their captions."""
    storage, shards, vocabulary = Storage(), str(tmp_path / "shards"), str(tmp_path / "vocabulary.txt")
    write_photos(storage, [Path(photos)], shards, samples=32, at_least=2)
    Tokenizer.train(iter_captions(storage, shards), 200).save(storage, vocabulary)
    return Job("mome", shards, vocabulary, 16, 8, workers=0, threads=1, seed=0, operations=2, normalise=True)


def test_the_loaders_are_measured_with_rand_augment_and_without(photos):
    few = ("--samples", 16, "--batch", 8, "--rounds", 1, "--workers", 0, "--threads", 1)
    measured = facts("loader", "--photos", photos, *few, "--peer", "webdataset_pil")
    for table in (measured, measured["without_rand_augment"]):
        assert list(table["samples_per_core_second"]) == ["mome", "webdataset_pil"]
        assert set(table["parts"]) == {"read", "decode", "crop", "augment", "tokenise", "mask", "collate"}
        assert table["decode_limit"] > 0
        for name, rate in table["samples_per_core_second"].items():
            assert rate == pytest.approx(1000 / table["cpu_seconds_per_1000"][name])
    assert list(measured["uint8_peers"]["samples_per_core_second"]) == ["webdataset_pil"]
    outputs = measured["settings"]["outputs"]
    assert outputs == {"mome": "uint8 224x224x3", "webdataset_pil": "float32 3x224x224"}
    assert 0 <= measured["wait_share"] <= measured["next_share"] <= 1


def test_ray_data_is_measured_apart_from_its_daemons(job, tmp_path):
    measured = run_job(replace(job, contender="ray_data"), tmp_path)
    assert measured["samples"] == 16
    assert measured["output"] == "float32 3x224x224"
    assert measured["cpu"]["work"] > 0
    assert measured["cpu"]["daemons"] > 0


@pytest.mark.parametrize("peer", ["webdataset_pil", "open_clip_composition"])
@pytest.mark.parametrize("normalise", [True, False])
def test_peers_deliver_the_pairs_of_the_shards(job, peer, normalise):
    stream = PEERS[peer](replace(job, normalise=normalise).work)
    image, text = next(stream.warm_up)
    assert (image.dtype, tuple(image.shape)) == (
        (torch.float32, (8, 3, 224, 224)) if normalise else (torch.uint8, (8, 224, 224, 3))
    )
    tokenizer = Tokenizer.load(Storage(), job.vocabulary)
    said = {tokenizer.decode(tokenizer.encode(caption, 40).ids) for caption in captions(job)}
    assert {tokenizer.decode(row[row != tokenizer.pad_id]) for row in text[:, 0].numpy()} <= said
    hidden = text[:, 2] != pillow.IGNORED
    assert hidden.any()
    assert torch.equal(text[:, 2][hidden], text[:, 0][hidden])
    assert torch.equal(text[:, 1][~hidden], text[:, 0][~hidden])


def captions(job: Job) -> list[str]:
    return list(iter_captions(Storage(), job.shards))


@pytest.mark.parametrize("name", pillow.NAMES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_pillow_carries_out_the_same_operations_as_ours(name, sign):
    """Within what interpolation at the borders and rounding may differ: 26 dB."""
    rows, columns = np.mgrid[:224, :224] / 224
    waves = [np.sin(9 * rows + 4 * columns + phase) for phase in (0, 1, 2)]
    image = np.uint8(128 + 90 * np.stack(waves, axis=2))
    ours = augment.OPERATIONS[name](image, 0.7, sign).astype(float)
    theirs = np.asarray(pillow.OPERATIONS[name](Image.fromarray(image), 0.7, sign)).astype(float)
    assert 10 * math.log10(255**2 / max(((ours - theirs) ** 2).mean(), 1e-9)) > 26


def test_the_peers_draw_from_our_operations():
    assert pillow.NAMES == augment.NAMES
    assert tuple(PEERS) == TOLD_PEERS


def test_cpu_time_of_children_counts_while_they_run_and_after_they_ended():
    before = tree_cpu_seconds(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", BURN.format(seconds=0.2) + "\nprint(flush=True)\ninput()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    running = (tree_cpu_seconds(os.getpid()) - before).work
    child.communicate(b"\n")
    ended = (tree_cpu_seconds(os.getpid()) - before).work
    assert running > 0.15
    assert ended >= running


def test_drawn_pictures_are_the_same_each_time_and_as_large_as_photos():
    drawn, again = list(draw_samples(2)), list(draw_samples(2))
    assert drawn == again
    assert drawn[0]["jpg"] != drawn[1]["jpg"]
    for sample in drawn:
        assert simplejpeg.decode_jpeg_header(sample["jpg"])[:2] == (HEIGHT, WIDTH)
        assert 60_000 < len(sample["jpg"]) < 130_000


def test_what_cannot_be_measured_is_refused_by_name(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("no picture")
    refusals = {
        "sorcery": run("loader", "--peer", "sorcery"),
        "s3://b/shards": run("loader", "--shards", "s3://b/shards"),
    }
    for told, result in refusals.items():
        assert isinstance(result.exception, ConfigError)
        assert told in str(result.exception)
    assert isinstance(run("loader", "--photos", tmp_path / "empty").exception, DataError)


def test_a_failed_contender_is_named_with_its_last_words(job, tmp_path):
    with pytest.raises(RunFailed, match=r"(?s)webdataset_pil ended.*nowhere"):
        run_job(replace(job, contender="webdataset_pil", shards="/nowhere"), tmp_path)


def test_a_store_is_measured_beside_other_clients(tmp_path):
    measured = facts("storage", tmp_path, "--object-mib", 1, "--range-mib", 1, "--objects", 3, "--rounds", 1)
    assert {"mome", "fsspec.cat_ranges"} <= set(measured["read"])
    assert os.listdir(tmp_path) == []


def test_the_stall_of_a_save_is_measured_beside_a_synchronous_one(tmp_path):
    demo = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
    measured = facts("checkpoint", demo, "--mb-per-second", 20, "--url", tmp_path)
    assert measured["bytes"] == 12 * measured["parameters"]
    assert measured["synchronous_seconds"] > measured["bytes"] / 20e6
    assert measured["ratio"] == pytest.approx(measured["stall_seconds"] / measured["synchronous_seconds"])
    assert measured["ratio"] < 0.5
    assert not list(tmp_path.rglob("*.safetensors"))
