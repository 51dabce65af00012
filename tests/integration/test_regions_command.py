"""`mome shards regions` on Ray actors writes the same bytes for any number of actors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil
from typer.testing import CliRunner

from jobs.shards import app
from pipeline.config.errors import ConfigError
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage

NUMBERS, CLASSES = 16, 5


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=NUMBERS, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=12, num_labels=CLASSES,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(make_pairs, make_pair) -> str:
    bad = {"jpg": b"\xff\xd8\xff no picture", "json": make_pair(0)["json"]}
    return make_pairs("pairs", [4, 3, 5], planted={(1, 2): bad})


def run(*arguments: object) -> tuple[dict, str]:
    result = CliRunner().invoke(app, ["regions", *map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_one_worker_and_two_write_the_same_bytes(pairs: str, detector: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        run(pairs, tmp_path / str(workers), "--detector", detector, "--workers", workers)
    digests = [load_manifest(Storage(), str(tmp_path / str(workers))).digest for workers in (1, 2)]
    assert digests[0] == digests[1]


def test_folder_without_a_detector_is_rejected(pairs: str, tmp_path: Path) -> None:
    (tmp_path / "detector").mkdir()
    with pytest.raises(ConfigError, match="no detector that transformers can load"):
        run(pairs, tmp_path / "out", "--detector", tmp_path / "detector")
