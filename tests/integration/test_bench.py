"""`mome bench`: each command measures a small load, what it compares does the same work, and no files stay behind."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from jobs.bench import PEERS, app, comparison, step_table
from jobs.bench.storage import MIB, bench_storage, clients_of
from pipeline.config.errors import ConfigError, DataError, RunFailed, StorageError
from pipeline.config.schema import StorageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples import augment
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage, join
from tests.support.pairs import pair
from tests.support.shards_command import write_lines
from tests.support.short_run import DEMO

# The package's attributes of these names are the commands.
loader, storage_bench = (importlib.import_module(f"jobs.bench.{name}") for name in ("loader", "storage"))
READ = {"mb_per_second", "cpu_seconds_per_gib", "first_byte_seconds", "requests"}
LIST = {"seconds", "cpu_seconds", "objects_per_second", "requests"}
LOCAL = {"mome", "mome.open", "fsspec.cat_ranges", "fsspec.open"}
SIZE = 3 * MIB + 5  # the last range is shorter


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def figures(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write a folder of twelve images with their captions."""
    pairs = {f"{number}.jpg": pair(number) for number in range(12)}
    for name, members in pairs.items():
        (tmp_path / name).write_bytes(members["jpg"])
    lines = ({"image": name, **json.loads(members["json"])} for name, members in pairs.items())
    return write_lines(tmp_path / "captions.jsonl", *lines).parent


def test_loaders_are_measured_with_and_without_rand_augment(photos: Path) -> None:
    few = ("--samples", 16, "--batch", 8, "--rounds", 1, "--workers", 0, "--threads", 1)
    measured = figures("loader", "--photos", photos, *few, "--peer", "webdataset_pil")
    for table in (measured, measured["without_rand_augment"]):
        assert list(table["samples_per_core_second"]) == ["mome", "webdataset_pil"]
        for name, rate in table["samples_per_core_second"].items():
            assert rate == pytest.approx(1000 / table["cpu_seconds_per_1000"][name])
    assert measured["decode_limit"] > 0
    assert measured["settings"]["outputs"] == {"mome": "uint8 224x224x3", "webdataset_pil": "float32 3x224x224"}


@pytest.mark.parametrize("peer", PEERS)
def test_peer_delivers_the_shards_pairs_and_its_failure_is_reported(tmp_path: Path, photos: Path, peer: str) -> None:
    storage, shards, vocabulary = Storage(), str(tmp_path / "shards"), str(tmp_path / "vocabulary.txt")
    loader.write_photos(storage, (photos,), shards, samples=32, min_shards=2)
    storage.write(vocabulary, Tokenizer.train(iter_captions(storage, shards), 200).vocabulary_file)
    job = loader.BenchJob(peer, shards, vocabulary, 16, 8, workers=0, threads=1, num_ops=2)
    image, text = next(loader.peer_batches(job))
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (8, 3, 224, 224))
    tokenizer = Tokenizer.load(storage, vocabulary)
    captions = {tokenizer.decode(tokenizer.encode(caption, 40).ids) for caption in iter_captions(storage, shards)}
    ids, inputs, labels = text.unbind(1)
    assert {tokenizer.decode(row[row != tokenizer.pad_id]) for row in ids.numpy()} <= captions
    masked = labels != loader.IGNORED
    assert masked.any()
    assert torch.equal(labels[masked], ids[masked])
    assert torch.equal(inputs[~masked], ids[~masked])
    with pytest.raises(RunFailed, match=rf"(?s){peer} ended.*nowhere"):
        loader.run_job(replace(job, shards="/nowhere"), tmp_path)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_other_loaders_draw_the_same_operations_as_ours(sign: float) -> None:
    assert tuple(loader.OPERATIONS) == augment.NAMES
    rows, columns = np.mgrid[:224, :224] / 224
    image = np.uint8(128 + 90 * np.stack([np.sin(9 * rows + 4 * columns + phase) for phase in (0, 1, 2)], axis=2))
    for name, operation in loader.OPERATIONS.items():
        ours = augment.OPERATIONS[name](image, 0.7, sign).astype(float)
        theirs = np.asarray(operation(Image.fromarray(image), 0.7, sign)).astype(float)
        assert 10 * math.log10(255**2 / max(((ours - theirs) ** 2).mean(), 1e-9)) > 26, (
            name
        )  # interpolation at borders, rounding


def test_cpu_time_includes_children_and_synthetic_photos_are_of_real_size() -> None:
    before = loader.tree_cpu_seconds()
    program = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    while_running = loader.tree_cpu_seconds() - before
    child.communicate(b"\n")
    assert while_running > 0.15
    assert loader.tree_cpu_seconds() - before >= while_running - 0.02
    photos = list(loader.synthetic_photos(2))
    assert photos == list(loader.synthetic_photos(2))
    assert photos[0]["jpg"] != photos[1]["jpg"]
    assert all(60_000 < len(sample["jpg"]) < 130_000 for sample in photos)
    assert {simplejpeg.decode_jpeg_header(s["jpg"])[:2] for s in photos} == {(loader.HEIGHT, loader.WIDTH)}


def test_unusable_settings_are_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    values = {"--peer": ("sorcery", ConfigError), "--shards": ("s3://b/x", ConfigError)}
    for option, (value, kind) in (values | {"--photos": (str(tmp_path), DataError)}).items():
        error = run("loader", option, value).exception
        assert isinstance(error, kind)
        assert value in str(error)
    for option in ("--rounds", "--range-mib", "--object-mib", "--objects", "--in-flight"):
        refused = run("storage", option, 0)
        assert (refused.exit_code, option in refused.output) == (2, True)


def test_figures_are_shown_beside_each_other_and_memory_beside_the_plan() -> None:
    measured = {"states": 151_166_440, "activations": 0, "total": 661_439_576}
    planned = measured | {"total": 330_719_788}
    result = {"stage": "pairs", "world_size": 2, "step_seconds": 0.0123, "pairs_per_second": 24.94, "tflops": 0.034}
    result |= {"mfu": 0.5, "measured": measured, "predicted": planned}
    lines = comparison("read by", {"mome": {"mb_per_second": 3296.4, "requests": 0}}).splitlines()
    assert [line.split() for line in lines] == [["read", "by", "MB/s", "requests"], ["mome", "3,296", "0"]]
    lines = step_table(result).splitlines()
    assert lines[0] == "stage pairs on 2 ranks: 12.3 ms a step"
    assert [line.split()[1:] for line in lines[-3:]] == [
        ["151", "MB", "151", "MB", "1"], ["0", "kB", "0", "kB", "–"], ["661", "MB", "331", "MB", "0.5"],
    ]  # fmt: skip


def test_stall_of_saves_is_measured(tmp_path: Path) -> None:
    measured = figures("checkpoint", DEMO, "--mb-per-second", 20, "--url", tmp_path)
    assert measured["bytes"] == 12 * measured["parameters"]
    assert measured["synchronous_seconds"] > measured["bytes"] / 20e6
    assert measured["ratio"] == pytest.approx(measured["stall_seconds"] / measured["synchronous_seconds"])
    assert measured["ratio"] < 0.5
    assert not list(tmp_path.rglob("*.safetensors"))


def test_every_client_reads_an_object_and_lists_a_folder(tmp_path: Path, s3: Any) -> None:
    for url, config in ((s3.url("measured"), s3.config), (str(tmp_path), StorageConfig())):
        storage, data = Storage(config), os.urandom(SIZE)
        for name in ("object", "many/one", "many/other"):
            storage.write(join(url, name), data)
        readers, listers = clients_of(storage, url, SIZE, MIB, in_flight=2)
        assert all(b"".join(read()) == data for read in readers.values())
        assert all(sorted(names()) == ["one", "other"] for names in listers.values())


def test_requests_are_counted_and_no_files_are_left(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"object_bytes": SIZE, "range_bytes": MIB, "objects": 3}
    result = bench_storage(s3.url("measured"), s3.config, **small, rounds=2)
    read, listing = result["read"], result["list"]
    assert (result["url"], result["object_bytes"], listing.pop("objects")) == (s3.url("measured"), SIZE, 3)
    assert set(read) == LOCAL | {"botocore.ranges", "botocore.open"}
    assert all(set(figures) == READ for figures in read.values())
    assert read["botocore.ranges"]["requests"] == read["fsspec.cat_ranges"]["requests"] == 4
    assert (read["mome"]["requests"] >= 4, read["botocore.open"]["requests"]) == (True, 1)
    assert set(listing) == {"mome", "fsspec.ls", "botocore.list_objects_v2"}
    assert all(set(figures) == LIST and figures["requests"] >= 1 for figures in listing.values())
    assert Storage(s3.config).list(s3.url()) == []
    local = figures("storage", tmp_path, "--object-mib", 1, "--range-mib", 1, "--objects", 3, "--rounds", 1)["read"]
    assert {name: figures["requests"] for name, figures in local.items()} == dict.fromkeys(LOCAL, 0)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    assert bench_storage(object_bytes=MIB, objects=2, rounds=1)["store"] == "moto"
    assert [server.poll() is not None for server in started] == [True]
    monkeypatch.setattr(storage_bench, "clients_of", lambda *_: ({"short": lambda: iter([b"1"])}, {}))
    with pytest.raises(StorageError, match=rf"object: 1 of {SIZE} bytes were read"):
        bench_storage(str(tmp_path), object_bytes=SIZE)
    assert list(tmp_path.iterdir()) == []
