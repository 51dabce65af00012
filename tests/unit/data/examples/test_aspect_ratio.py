"""Images that keep their aspect ratio (ViLT): their sizes, and batches of them."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from transformers.models.vilt.image_processing_pil_vilt import get_resize_output_image_size

from pipeline.config.errors import ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.contents.images import KeepAspectRatio, on_one_canvas, random_resized_crop, resize
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples.augment import augment
from pipeline.data.loading.loader import Loader, fingerprint
from pipeline.data.randomness import CounterRandom
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.objectives import batch_groups, check_objectives

PAPER, RELEASE = KeepAspectRatio(384, 640, 32), KeepAspectRatio(384, 639, 32)
SHAPES = [(24, 24), (24, 40), (40, 24), (24, 30), (8, 60), (60, 8), (33, 24), (24, 37), (48, 24), (24, 48), (31, 50)]


# ---- sizes


def test_sizes_are_those_of_hugging_faces_processor() -> None:
    """The default is the rule of ViLT's release, whose longest side is int(1333 / 800 * 384)."""
    random = np.random.default_rng(0)
    for height, width in random.integers(150, 1200, (300, 2)).tolist():
        blank = np.zeros((height, width, 3), dtype=np.uint8)
        for shape in (PAPER, RELEASE):
            expected = get_resize_output_image_size(blank, shape.shorter, shape.longest, 32, "channels_last")
            assert shape.sides(height, width) == expected, (height, width)


def test_largest_image_has_240_patches_and_228_in_the_release() -> None:
    for shape, most in ((PAPER, (384, 640)), (RELEASE, (384, 608))):
        assert max(shape.sides(300, width) for width in range(300, 900)) == most
        assert shape.canvas == most[1]
        assert shape.num_patches == most[0] * most[1] // 32**2


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 5000), (1, 1), (333, 500), (5, 99)])
def test_trap_thin_images_keep_at_least_one_patch_per_side(height: int, width: int) -> None:
    """The release floors the short side of images 20 times as long as wide to 0."""
    rows, columns = PAPER.sides(height, width)
    assert 32 <= rows <= 640
    assert 32 <= columns <= 640
    assert rows % 32 == columns % 32 == 0
    assert rows * columns // 32**2 <= PAPER.num_patches
    assert resize(np.zeros((height, width, 3), dtype=np.uint8), PAPER).shape == (rows, columns, 3)


# ---- augmentation


def picture(height: int, width: int, number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_without_augmentation_images_are_only_resized() -> None:
    from pipeline.config.schema import AugmentConfig

    plain = AugmentConfig(crop_scale=(1.0, 1.0), flip=False, num_ops=0)
    image = picture(300, 420)
    for key in range(3):
        found = augment(image, plain, KeepAspectRatio(64, 96, 16), CounterRandom(key), allow_flip=True)
        assert (found == resize(image, KeepAspectRatio(64, 96, 16))).all()


def test_crops_keep_aspect_ratio_and_area_fraction() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 150, 3)).copy()
    shape = KeepAspectRatio(48, 64, 16)
    for key in range(20):
        crop = random_resized_crop(ramp, shape, (0.25, 1.0), CounterRandom(key))
        assert crop.shape[:2] == shape.sides(200, 150)
        share = (int(crop[-1, 0, 0]) - int(crop[0, 0, 0]) + 4) / 200  # of the height; 4 rows make up one of the crop's
        assert 0.45 <= share <= 1.03


def test_images_are_padded_at_the_bottom_and_right() -> None:
    pictures = [picture(8, 24), picture(16, 8), picture(8, 8)]
    canvases, sizes = on_one_canvas(pictures)
    assert canvases.shape == (3, 16, 24, 3)
    assert sizes.tolist() == [[8, 24], [16, 8], [8, 8]]
    for image, canvas, (height, width) in zip(pictures, canvases, sizes.tolist(), strict=True):
        assert (canvas[:height, :width] == image).all()
        assert not canvas[height:].any()
        assert not canvas[:, width:].any()


# ---- batches


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture {number} shows a thing" for number in range(60)], 200)


@pytest.fixture
def folder(make_pairs, make_pair) -> str:
    planted = {}
    for number in range(33):
        jpeg = simplejpeg.encode_jpeg(picture(*SHAPES[number % len(SHAPES)], number), 90, "RGB", "444")
        planted[number // 11, number % 11] = make_pair(number) | {"jpg": jpeg}
    made = make_pairs("shaped", [11, 11, 11], planted)
    index_shards(Storage(), made)
    return made


def run_config(folder: str, model: dict | None = None, source_type: str = "pairs", **stage) -> RunConfig:
    sizes = {"width": 32, "layers": 2, "heads": 2, "image_size": 24, "longest_side": 40, "patch_size": 8}
    values = {
        "name": "test",
        "seed": 3,
        "model": {"kind": "vilt", **sizes, "max_visible_patches": 10, **(model or {})},
        "sources": {"pairs": {"shards": folder, "type": source_type}},
        "data": {"streams": 5, "shuffle_window": 2},
        "stages": [
            {
                "name": "stage",
                "sources": {"pairs": 1.0},
                "objectives": {"mlm": {}, "itm": {}, "mim": {}},
                "negatives": "random",
                "steps": 100,
                "global_batch_size": 10,
                "max_text_length": 12,
                **stage,
            }
        ],
    }
    return validate(values, "test")


def take(
    config: RunConfig, tokenizer: Tokenizer, count: int, start: int = 0, rank: int = 0, world: int = 1
) -> list[Batch]:
    with Loader(
        config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, rank, world
    ) as loader:
        return list(islice(loader.batches(start), count))


def test_batches_are_cut_to_the_largest_image(folder: str, tokenizer: Tokenizer) -> None:
    for batch in take(run_config(folder), tokenizer, 6):
        assert batch.image.shape[1:3] == tuple(batch.image_size.max(dim=0).values.tolist())
        assert (batch.image_size % 8 == 0).all()
        counts = (batch.image_size // 8).prod(dim=1)
        read = batch.visible_patches >= 0
        assert torch.equal(read.sum(dim=1), counts.clamp(max=10))
        assert read.any(dim=0).all()
        for row, count in enumerate(counts.tolist()):
            mine = batch.visible_patches[row][read[row]]
            assert (mine.diff() > 0).all()
            assert mine.max() < count
            if count <= 10:
                assert mine.tolist() == list(range(count))
            height, width = batch.image_size[row].tolist()
            assert not batch.image[row, height:].any()
            assert not batch.image[row, :, width:].any()


def test_masked_fraction_of_visible_patches_is_constant(folder: str, tokenizer: Tokenizer) -> None:
    for batch in take(run_config(folder, masking={"image_mask_ratio": 0.3}), tokenizer, 3):
        for row in range(len(batch)):
            masked = set(batch.patch_positions[row].tolist()) - {-1}
            read = set(batch.visible_patches[row].tolist()) - {-1}
            assert masked <= read
            assert len(masked) == max(1, round(0.3 * len(read)))


def test_visible_patches_differ_between_epochs(folder: str, tokenizer: Tokenizer) -> None:
    seen: dict[int, set[tuple[int, ...]]] = {}
    for batch in take(run_config(folder), tokenizer, 12):
        for row in range(len(batch)):
            if (batch.image_size[row] // 8).prod() > 10:
                seen.setdefault(int(batch.uid[row]), set()).add(tuple(batch.visible_patches[row].tolist()))
    assert seen
    assert all(len(ways) > 1 for ways in seen.values())


def test_without_limit_every_patch_is_visible(folder: str, tokenizer: Tokenizer) -> None:
    batch = take(run_config(folder, {"max_visible_patches": None}), tokenizer, 1)[0]
    assert torch.equal((batch.visible_patches >= 0).sum(dim=1), (batch.image_size // 8).prod(dim=1))


def test_mim_examples_include_text_where_there_is_one(folder, tokenizer) -> None:
    alone = {"objectives": {"mim": {}}}
    assert take(run_config(folder, **alone), tokenizer, 1)[0].text is not None
    assert take(run_config(folder, source_type="images", **alone), tokenizer, 1)[0].text is None


def test_batches_do_not_depend_on_world_size(folder: str, tokenizer: Tokenizer) -> None:
    config = run_config(folder, masking={"mask_token_prob": 0.8, "random_patch_prob": 0.1})
    stage = config.stages[0]
    prints = {
        fingerprint(config, stage, batch_groups(config, stage), Storage(), tokenizer, range(2, 6), world_size)
        for world_size in (1, 2, 5)
    }
    assert len(prints) == 1


@pytest.mark.parametrize("member", ["image", "image_size", "visible_patches", "patch_positions"])
def test_fingerprint_depends_on_every_field(folder: str, tokenizer: Tokenizer, member: str) -> None:
    from dataclasses import replace

    batch = take(run_config(folder), tokenizer, 1)[0]
    changed = getattr(batch, member).clone()
    changed.view(-1)[0] += 8 if member == "image_size" else 1
    prints = []
    for each in (batch, replace(batch, **{member: changed})):
        digest = hashlib.sha256()
        each.hash_into(digest)
        prints.append(digest.hexdigest())
    assert prints[0] != prints[1]


def test_image_shape_enters_the_digest(folder: str, tokenizer: Tokenizer) -> None:
    changes = [{}, {"longest_side": 48}, {"max_visible_patches": 9}, {"image_size": 32}]
    digests = set()
    for model in changes:
        config = run_config(folder, model)
        with Loader(
            config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, 0, 1
        ) as loader:
            digests.add(loader.digest)
    assert len(digests) == len(changes)


def test_buckets_by_image_group_similar_shapes(folder: str, tokenizer: Tokenizer) -> None:
    areas = {}
    for name, stage in {"mixed": {}, "alike": {"buckets": {"by": "image", "batches": 6}}}.items():
        batches = take(run_config(folder, **stage), tokenizer, 12)
        areas[name] = np.mean([batch.image.shape[1] * batch.image.shape[2] for batch in batches])
    assert areas["alike"] < 0.95 * areas["mixed"]


def test_both_images_of_a_statement_keep_their_shape(tmp_path: Path, make_tar, tokenizer: Tokenizer) -> None:
    samples = {}
    for number in range(10):
        first, second = (picture(*SHAPES[(number + turn) % len(SHAPES)], number) for turn in (0, 3))
        samples[f"s{number}"] = {
            "0.jpg": simplejpeg.encode_jpeg(first, 90, "RGB", "444"),
            "1.jpg": simplejpeg.encode_jpeg(second, 90, "RGB", "444"),
            "json": json.dumps({"sentence": "picture 3 shows a thing", "label": True, "id": "1"}).encode(),
        }
    (tmp_path / "00000.tar").write_bytes(make_tar(samples))
    index_shards(Storage(), str(tmp_path))
    config = run_config(str(tmp_path), source_type="statements", objectives={"nlvr2": {}})
    batch = take(config, tokenizer, 1)[0]
    assert batch.visible_patches is None
    for name in ("image", "second_image"):
        size = getattr(batch, f"{name}_size")
        assert getattr(batch, name).shape[1:3] == tuple(size.max(dim=0).values.tolist())
    assert not torch.equal(batch.image_size, batch.second_image_size)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"masking": {"patch_shape": "blocks"}}, "patch_shape: blocks"),
        ({"image_target": "visual_tokens"}, "image_target: visual_tokens"),
        ({"objectives": {"wpa": {}, "itm": {"every": 2}}}, "set the same `every` for both"),
    ],
)
def test_square_only_objectives_are_rejected(folder: str, stage: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_objectives(run_config(folder, **stage))
