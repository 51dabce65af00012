"""Mistakes of users end in one message and the documented exit status, before anything is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.driver import Interrupts
from jobs.submit import submit
from jobs.train import pretrain
from pipeline.config.errors import ConfigError, DataError, MomeError, RunFailed, StorageError, TrackingError
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.training.checkpoint.weights import save_weights
from pipeline.training.prepare import prepare
from tests.support.pairs import pair, tar_bytes

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


def demo(folder: Path, *overrides: str) -> RunConfig:
    """Return the demo's config, shortened, with all paths below `folder`."""
    places = [f"sources.{name}.shards={folder}/scenes" for name in ("scenes", "pictures", "sentences")]
    small = ["sources.scenes.synthetic.scenes=60", "sources.unseen.synthetic.scenes=10"]
    return load_config(
        DEMO, [f"output={folder}/runs", f"sources.unseen.shards={folder}/unseen", *places, *small, *overrides]
    )


def refuse(config: RunConfig, kind: type[MomeError] = DataError, status: int = 1) -> str:
    """Return the message of the error that ends a run."""
    with pytest.raises(kind) as error:
        pretrain(config, lambda progress: None, Interrupts(config, Storage(config.storage)))
    assert error.value.exit_status == status
    return str(error.value)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300, "check": False}
    return subprocess.run([sys.executable, "-m", *command], **options)


def test_command_line_ends_with_status_2_and_one_message(tmp_path: Path) -> None:
    done = run("jobs.cli", "train", str(DEMO), "model.widht=3", f"output={tmp_path}/runs")
    assert done.returncode == 2
    assert "model.widht: unknown key; did you mean 'width'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_missing_and_empty_data_other_widths_changed_keys_and_local_folders_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "0.tar").write_bytes(tar_bytes({}))
    index_shards(Storage(), f"{tmp_path}/empty")
    for name, expected in (("empty", "empty: its shards have no samples"), ("nowhere", f"{tmp_path}/nowhere")):
        assert expected in refuse(demo(tmp_path, f"sources.pictures.shards={tmp_path}/{name}"))
    assert not (tmp_path / "runs" / "demo" / "run.json").exists()
    narrow = demo(tmp_path, "model.width=64", "name=narrow")
    metadata = {"config": narrow.model_dump(mode="json"), "stage": "vision", "step": 1}
    vocabulary = list(prepare(narrow, Storage()).tokens)
    save_weights(Storage(), f"{narrow.folder}/stages/0-vision", {}, vocabulary, metadata)
    message = refuse(demo(tmp_path, f"stages.language.start_from={narrow.folder}"), ConfigError, status=2)
    assert "width 64 there, 128 here" in message
    prepare(demo(tmp_path), Storage())
    overrides = ("stages.vision.masking.image_mask_ratio=0.7", "seed=8", "cluster.workers=1")
    message = refuse(demo(tmp_path, *overrides), ConfigError, status=2)
    assert "stages.0.masking.image_mask_ratio: was 0.4, now 0.7" in message
    assert "seed: was 7, now 8" in message
    assert "cluster.workers" not in message
    shard = sorted((tmp_path / "scenes").glob("*.tar"))[0]
    shard.unlink()
    assert shard.name in refuse(demo(tmp_path))
    with pytest.raises(ConfigError, match=r"sources\.scenes\.shards"):
        submit(load_config(DEMO), "http://head:8265", follow=False)


@pytest.mark.timeout(300)
def test_unreachable_service_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    no_server = demo(tmp_path, "tracking.uri=http://127.0.0.1:9")
    assert "tracking.required=false" in refuse(no_server, TrackingError)
    assert not (tmp_path / "runs").exists()
    store = "storage={endpoint_url: 'http://127.0.0.1:9', retry_timeout_seconds: 3}"
    no_store = demo(tmp_path, "sources.pictures.shards=s3://nowhere/pictures", store)
    assert "s3://nowhere/pictures" in refuse(no_store, StorageError)
    no_cluster = demo(tmp_path, "cluster.address='127.0.0.1:9'")
    assert "cluster.address 127.0.0.1:9" in refuse(no_cluster, RunFailed)


def test_corrupt_jpegs_are_replaced_and_a_non_finite_loss_stops_the_run_by_name(tmp_path: Path) -> None:
    samples = {f"{number:04d}": pair(number) for number in range(40)}
    for key in ("0003", "0017"):
        samples[key]["jpg"] = samples[key]["jpg"][: len(samples[key]["jpg"]) // 2]
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(tar_bytes(samples))
    index_shards(Storage(), f"{tmp_path}/tars")
    stage = "{name: vision, sources: {pairs: 1.0}, objectives: {mim: {}}, steps: 6, global_batch_size: 8}"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: tiny\noutput: {tmp_path}/runs\nsources: {{pairs: {{shards: {tmp_path}/tars, type: images}}}}\n"
        f"stages: [{stage}]\nengine: {{precision: float32}}\ncheckpoint: {{every: 3}}\n"
        "model: {width: 32, layers: 2, heads: 2, vision_language_layers: 1, image_size: 16, patch_size: 8}\n"
        "data: {streams: 2, max_bad_rate: 0.2}\n",
        encoding="utf-8",
    )
    done = run("pipeline.training", str(config))
    assert done.returncode == 0, done.stderr
    lines = [line for file in (tmp_path / "runs/tiny/quarantine").glob("*.jsonl") for line in file.open()]
    records = [json.loads(line) for line in lines]
    assert {record["key"] for record in records} == {"0003", "0017"}  # 48 samples: one epoch of 40 and a little more
    assert all(record["stage"] == "image" and record["shard"] == "0.tar" for record in records)
    optimizer = "stages.vision.optimizer={lr: 1e30, warmup_steps: 0, lr_schedule: constant}"
    done = run("pipeline.training", str(config), "name=diverging", "tracking.metrics_every=1", optimizer)
    assert done.returncode == 1
    assert all(text in done.stderr for text in ("stage vision, step", "optimizer.lr"))
    assert "is nan" in done.stderr or "is inf" in done.stderr
