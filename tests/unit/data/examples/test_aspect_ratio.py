"""Images that keep their aspect ratio (ViLT): their sizes, and batches of them."""

import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from transformers.models.vilt.image_processing_pil_vilt import get_resize_output_image_size

from pipeline.config.schema import AugmentConfig, RunConfig
from pipeline.data.contents.images import KeepAspectRatio, on_one_canvas, resize
from pipeline.data.examples.augment import augment
from pipeline.data.randomness import CounterRandom
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.data_stream import data_config, hash_of, open_loader, take

PAPER, RELEASE = KeepAspectRatio(384, 640, 32), KeepAspectRatio(384, 639, 32)
SHAPES = [(24, 24), (24, 40), (40, 24), (24, 30), (8, 60), (60, 8), (33, 24), (24, 37), (48, 24), (24, 48), (31, 50)]


def test_sizes_are_those_of_hugging_faces_processor_with_at_least_one_patch_per_side() -> None:
    """The default is the rule of ViLT's release, whose longest side is int(1333 / 800 * 384).

    The release floors the short side of images 20 times as long as wide to 0.
    """
    for height, width in np.random.default_rng(0).integers(150, 1200, (300, 2)).tolist():
        blank = np.zeros((height, width, 3), dtype=np.uint8)
        for shape in (PAPER, RELEASE):
            expected = get_resize_output_image_size(blank, shape.shorter, shape.longest, 32, "channels_last")
            assert shape.sides(height, width) == expected, (height, width)
    for shape, most in ((PAPER, (384, 640)), (RELEASE, (384, 608))):  # 240 and 228 patches
        assert max(shape.sides(300, width) for width in range(300, 900)) == most
        assert shape.canvas == most[1]
    for height, width in ((10, 1000), (1000, 10), (1, 5000), (1, 1), (333, 500)):
        rows, columns = PAPER.sides(height, width)
        assert 32 <= min(rows, columns) <= max(rows, columns) <= 640
        assert rows % 32 == columns % 32 == 0
        assert rows * columns // 32**2 <= 240
        assert resize(np.zeros((height, width, 3), dtype=np.uint8), PAPER).shape == (rows, columns, 3)


def noise(height: int, width: int, number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_crops_keep_aspect_ratio_and_area_fraction() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 150, 3)).copy()
    shape, plain = KeepAspectRatio(48, 64, 16), AugmentConfig(crop_scale=(1.0, 1.0), flip=False, num_ops=0)
    cropping = plain.model_copy(update={"crop_scale": (0.25, 1.0)})
    for key in range(20):
        crop = augment(ramp, cropping, shape, CounterRandom(key), allow_flip=False)
        assert crop.shape[:2] == shape.sides(200, 150)
        fraction = (int(crop[-1, 0, 0]) - int(crop[0, 0, 0]) + 4) / 200  # 4 of the image's rows make up one of these
        assert 0.45 <= fraction <= 1.03
    image = noise(300, 420)
    for key in range(3):
        assert (augment(image, plain, shape, CounterRandom(key), allow_flip=True) == resize(image, shape)).all()


def test_images_are_padded_at_the_bottom_and_right() -> None:
    images = [noise(8, 24), noise(16, 8), noise(8, 8)]
    canvases, sizes = on_one_canvas(images)
    assert canvases.shape == (3, 16, 24, 3)
    assert sizes.tolist() == [[8, 24], [16, 8], [8, 8]]
    for image, canvas in zip(images, canvases, strict=True):
        height, width = image.shape[:2]
        assert (canvas == np.pad(image, ((0, 16 - height), (0, 24 - width), (0, 0)))).all()


def encode(number: int) -> bytes:
    return simplejpeg.encode_jpeg(noise(*SHAPES[number % len(SHAPES)], number), 90, "RGB", "444")


@pytest.fixture
def folder(make_pairs, make_pair) -> str:
    planted = {divmod(number, 11): make_pair(number) | {"jpg": encode(number)} for number in range(33)}
    folder = make_pairs("shaped", [11, 11, 11], planted)
    index_shards(Storage(), folder)
    return folder


def run_config(
    folder: str, model: dict | None = None, source_type: str = "pairs", objectives=("mlm", "itm", "mim"), **stage
) -> RunConfig:
    sizes = {"width": 32, "layers": 2, "heads": 2, "image_size": 24, "longest_side": 40, "patch_size": 8}
    vilt = {"kind": "vilt", **sizes, "max_visible_patches": 10, **(model or {})}
    return data_config({"pairs": folder}, objectives, source_type, vilt, stage={"negatives": "random"} | stage)


def test_batches_are_cut_to_the_largest_image_and_to_visible_patches(folder: str) -> None:
    visible_of = defaultdict[int, set[tuple[int, ...]]](set)
    for batch in take(run_config(folder, masking={"image_mask_ratio": 0.3}), 12):
        assert batch.image.shape[1:3] == tuple(batch.image_size.max(dim=0).values.tolist())
        assert (batch.image_size % 8 == 0).all()
        counts, is_visible = (batch.image_size // 8).prod(dim=1), batch.visible_patches >= 0
        assert torch.equal(is_visible.sum(dim=1), counts.clamp(max=10))
        assert is_visible.any(dim=0).all()
        for row, count in enumerate(counts.tolist()):
            visible = batch.visible_patches[row][is_visible[row]]
            assert (visible.diff() > 0).all()
            assert visible.max() < count
            height, width = batch.image_size[row].tolist()
            assert not batch.image[row, height:].any()
            assert not batch.image[row, :, width:].any()
            masked = set(batch.patch_positions[row].tolist()) - {-1}
            assert masked <= set(visible.tolist())
            assert len(masked) == max(1, round(0.3 * len(visible)))  # the same fraction of the visible patches
            if count > 10:
                visible_of[int(batch.uid[row])].add(tuple(visible.tolist()))
    assert visible_of
    assert all(len(drawn) > 1 for drawn in visible_of.values())  # they differ between epochs
    (batch,) = take(run_config(folder, {"max_visible_patches": None}))
    assert torch.equal((batch.visible_patches >= 0).sum(dim=1), (batch.image_size // 8).prod(dim=1))
    pairs, images = (take(run_config(folder, None, kind, ("mim",)))[0] for kind in ("pairs", "images"))
    assert pairs.text is not None
    assert images.text is None


def test_every_field_enters_the_fingerprint_and_the_shape_of_images_the_digest(folder: str) -> None:
    config = run_config(folder, masking={"mask_token_prob": 0.8, "random_patch_prob": 0.1})
    assert len({hash_of(config, range(2, 6), world) for world in (1, 2, 5)}) == 1
    (batch,) = take(run_config(folder))
    fingerprints, digests = set(), set()
    fields = (None, "image", "image_size", "visible_patches", "patch_positions")
    for name in fields:
        changed, digest = batch, hashlib.sha256()
        if name is not None:
            values = getattr(batch, name).clone()
            values.view(-1)[0] += 8 if name == "image_size" else 1
            changed = replace(batch, **{name: values})
        changed.hash_into(digest)
        fingerprints.add(digest.hexdigest())
    assert len(fingerprints) == len(fields)
    models: list[dict] = [{}, {"longest_side": 48}, {"max_visible_patches": 9}, {"image_size": 32}]
    for model in models:
        with open_loader(run_config(folder, model)) as loader:
            digests.add(loader.digest)
    assert len(digests) == len(models)


def test_buckets_by_image_group_similar_shapes(folder: str) -> None:
    areas = []
    for stage in ({}, {"buckets": {"by": "image", "batches": 6}}):
        batches = take(run_config(folder, **stage), 12)
        areas.append(np.mean([batch.image.shape[1] * batch.image.shape[2] for batch in batches]))
    assert areas[1] < 0.95 * areas[0]


def test_both_images_of_a_statement_keep_their_shape(tmp_path: Path, make_tar) -> None:
    statement = json.dumps({"sentence": "picture 3 shows a thing", "label": True, "id": "1"}).encode()
    samples = {f"s{n}": {"0.jpg": encode(n), "1.jpg": encode(n + 3), "json": statement} for n in range(10)}
    (tmp_path / "00000.tar").write_bytes(make_tar(samples))
    index_shards(Storage(), str(tmp_path))
    (batch,) = take(run_config(str(tmp_path), None, "statements", ("nlvr2",)))
    assert batch.visible_patches is None
    for image, size in ((batch.image, batch.image_size), (batch.second_image, batch.second_image_size)):
        assert image.shape[1:3] == tuple(size.max(dim=0).values.tolist())
    assert not torch.equal(batch.image_size, batch.second_image_size)
