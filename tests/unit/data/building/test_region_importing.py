"""Import of region features from other detectors: `mome shards build` of jsonl lines that name regions."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.load import validate
from pipeline.data.building.files import Problems
from pipeline.data.building.importers import jsonl_samples, write_shards
from pipeline.data.contents.regions import parse_regions
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import Loader
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.objectives import batch_groups, regions_of
from tests.support.imports import record_of, save_image, write_lines

LOWEST, LONGEST = 800, 1333  # sides to which torchvision's Faster R-CNN resizes images


@pytest.fixture
def npz(tmp_path: Path) -> bytes:
    """Write the regions a.npz, and return them."""
    boxes = np.array([[0, 0, 50, 40], [10, 10, 20, 30]], np.float32)
    np.savez(tmp_path / "a.npz", features=np.ones((2, 4), np.float32), boxes=boxes)
    return (tmp_path / "a.npz").read_bytes()


def test_regions_are_stored_with_or_without_image(npz: bytes, tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    file = write_lines(
        tmp_path / "lines.jsonl",
        {"image": "a.jpg", "regions": "a.npz", "captions": ["one"]},
        {"regions": "a.npz", "caption": "two"},
        {"regions": "a.npz", "caption": "three"},
    )
    with_picture, alone = jsonl_samples(file, Problems(strict=True))
    assert list(with_picture) == ["__key__", "jpg", "npz", "json"]
    assert list(alone) == ["__key__", "npz", "json"]
    assert with_picture["npz"] == alone["npz"] == npz
    assert record_of(alone)["captions"] == ["two", "three"]


def test_image_size_is_added_if_the_file_has_none(npz: bytes, tmp_path: Path) -> None:
    record = {"regions": "a.npz", "caption": "one", "image_size": [60, 80]}
    (sample,) = jsonl_samples(write_lines(tmp_path / "lines.jsonl", record), Problems(strict=True))
    assert parse_regions(sample["npz"]).image_size == (60, 80)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"regions": "b.npz"}, "cannot be read"),
        ({"image_size": [30, 80]}, r"box 0 .* is outside an image of 80 x 30"),
        ({"image_size": [10**30, 80]}, "its image_size is"),
        ({"image_size": [-60, 80]}, "its image_size is"),
        ({"image_size": [True, 80]}, "its image_size is"),
        ({"image_size": 30}, r"its image_size is 30; expected \[height, width\]"),
    ],
)
def test_unusable_regions_are_skipped_and_reported(
    npz: bytes, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    file = write_lines(tmp_path / "lines.jsonl", {"regions": "a.npz", "caption": "one"} | changes)
    assert list(jsonl_samples(file, problems := Problems())) == []
    assert problems.count == 1
    assert re.search(reason, problems.first[0])


def test_real_feature_files_round_trip(shared: Path, tmp_path: Path) -> None:
    """Features of photographs by Faster R-CNN (`../shared/data`) pass through shards and loader into a model."""
    folder = shared / "data" / "region_features"
    lines = []
    for path in sorted((folder / "features_npz").glob("*.npz")):
        picture = next((folder / "images").rglob(path.name.removesuffix(".npz")))
        width, height = Image.open(picture).size
        scale = min(LOWEST / min(width, height), LONGEST / max(width, height))
        size = [int(height * scale), int(width * scale)]
        captions = [f"a photograph called {path.name}"]
        lines.append({"regions": str(path), "image": str(picture), "image_size": size, "captions": captions})
    assert len(lines) == 12
    file = write_lines(tmp_path / "lines.jsonl", *lines)
    samples = jsonl_samples(file, Problems(strict=True, allow_outside=True))
    write_shards(Storage(), samples, str(tmp_path / "shards"), 5)

    config = validate(
        {
            "name": "real",
            "model": {
                "kind": "imagebert", "width": 32, "layers": 2, "heads": 2, "max_text_length": 12,
                "region_features": 1024,
                "max_regions": 40, "dropout": 0.0,
            },
            "sources": {"real": {"shards": str(tmp_path / "shards"), "type": "regions"}},
            "data": {"streams": 1, "max_bad_rate": 0.0},
            "stages": [
                {
                    "name": "regions", "sources": {"real": 1.0}, "steps": 9, "global_batch_size": 12,
                    "max_text_length": 12,
                    "objectives": {"mrfr": {}, "mlm": {}},
                }
            ],
        },
        "real",
    )  # fmt: skip
    tokenizer = Tokenizer.train([line["captions"][0] for line in lines], 100)
    with Loader(config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, 0, 1) as loader:
        (batch,) = islice(loader.batches(0), 1)
    assert batch.region_features is not None
    assert batch.region_features.shape == (12, 40, 1024)
    kept = sorted(batch.region_keep.sum(dim=1).tolist())
    assert kept == sorted(min(40, len(np.load(line["regions"])["features"])) for line in lines)
    assert batch.region_location.min() >= 0
    assert batch.region_location.max() <= 1
    assert len(set(batch.image_id.tolist())) == 12
    model = build_model(config.model, tokenizer.size).eval()
    with torch.no_grad():
        embedded = model.region_embedding(regions_of(batch), torch.zeros(32))
    assert embedded.isfinite().all()
