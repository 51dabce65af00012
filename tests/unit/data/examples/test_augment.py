"""Augmentation: VLMo's ten operations at the published magnitudes, with counter-based randomness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from pipeline.config.load import load_config
from pipeline.config.schema import AugmentConfig
from pipeline.data.examples.augment import (
    FILL,
    MAX_MAGNITUDE,
    NAMES,
    OPERATIONS,
    ROTATE,
    SHEAR,
    SIDES,
    TRANSLATE,
    augment,
    enhance_factor,
    rotate,
    sharpness,
    translate,
    warp,
)
from pipeline.data.randomness import CounterRandom, hash64

CONFIGS = Path(__file__).parents[4] / "configs"
PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), flip=False, num_ops=0)


def picture(size: int = 64) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.stack([40 + 170 * x, 60 + 120 * y, 120 + 60 * np.sin(9 * x) * np.cos(7 * y)], axis=2)
    return image.astype(np.uint8)


def close(one: np.ndarray, other: np.ndarray, by: float = 2.0) -> bool:
    return np.abs(one.astype(int) - other.astype(int)).max() <= by


def test_operations_are_vlmos_ten():
    assert set(NAMES) == {
        "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness",
        "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
    }  # fmt: skip


def test_magnitudes_are_the_published_ones():
    assert (SHEAR, TRANSLATE, ROTATE) == (0.3, 10 / 224, 30.0)
    assert [round(enhance_factor(level / 10), 6) for level in (0, 5, 7, 10)] == [0.1, 1.0, 1.36, 1.9]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("finetune/vilt_*.yaml")), ids=lambda path: path.stem)
def test_vilts_recipes_have_vilts_strengths(path):
    """ViLT's list of operations and ranges gives value = 9 / 30 * (largest - smallest) + smallest."""
    ranges = {"rotate": (0.0, 30.0), "brightness": (0.1, 1.9), "sharpness": (0.1, 1.9), "shear": (0.0, 0.3)}
    published = {name: 9 / 30 * (high - low) + low for name, (low, high) in ranges.items()}
    assert published == pytest.approx({"rotate": 9.0, "brightness": 0.64, "sharpness": 0.64, "shear": 0.09})
    strength = load_config(path).data.augment.magnitude / MAX_MAGNITUDE
    ours = {"rotate": strength * ROTATE, "shear": strength * SHEAR}
    ours |= dict.fromkeys(("brightness", "sharpness"), enhance_factor(strength))
    assert ours == pytest.approx(published)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_every_operation_keeps_shape_type_and_input(name, sign):
    image = picture()
    before = image.copy()
    found = OPERATIONS[name](image, 0.7, sign)
    assert found.shape == image.shape
    assert found.dtype == np.uint8
    assert (image == before).all()


def test_each_operation_has_the_effect_of_its_magnitude():
    image = picture()
    expected = {
        ("Identity", 0.7, 1): image,
        ("Sharpness", 0.7, 1): sharpness(image, 1.36),
        ("ShearX", 0.7, -1): warp(image, [[1, -0.7 * 0.3, 0], [0, 1, 0]]),
        ("ShearY", 0.7, 1): warp(image, [[1, 0, 0], [0.7 * 0.3, 1, 0]]),
        ("TranslateX", 1.0, 1): translate(image, 10 / 224, True),
        ("TranslateY", 1.0, -1): translate(image, -10 / 224, False),
        ("Rotate", 0.7, -1): rotate(image, -21.0),
    }
    for (name, strength, sign), result in expected.items():
        assert (OPERATIONS[name](image, strength, sign) == result).all(), name


@pytest.mark.parametrize(
    ("name", "factor", "pillows", "by"),
    [
        ("AutoContrast", 1.0, ImageOps.autocontrast, 1),
        ("Equalize", 1.0, ImageOps.equalize, 4),  # the two round histograms differently
        ("Brightness", 1.36, lambda i: ImageEnhance.Brightness(i).enhance(1.36), 1),
        ("Brightness", 0.3, lambda i: ImageEnhance.Brightness(i).enhance(0.3), 1),
        ("Sharpness", 1.9, lambda i: ImageEnhance.Sharpness(i).enhance(1.9), 1),
        ("Sharpness", 0.1, lambda i: ImageEnhance.Sharpness(i).enhance(0.1), 1),
    ],
)
def test_colour_operations_agree_with_pillow(name, factor, pillows, by):
    image = picture(512)
    assert close(OPERATIONS[name](image, (factor - 0.1) / 1.8, 1), np.array(pillows(Image.fromarray(image))), by)


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_constant_images_are_unchanged(name):
    flat = np.full((16, 16, 3), 77, np.uint8)
    assert (OPERATIONS[name](flat, 1.0, 1) == flat).all()


def test_geometric_operations_fill_with_grey():
    image = picture()
    moved = translate(image, 8 / 64, True)
    assert (moved[:, 8:] == image[:, :-8]).all()
    assert (moved[:, :8] == FILL).all()
    assert (rotate(image, 90.0) == np.rot90(image)).all()
    sheared = warp(warp(image, [[1, 0.2, 0], [0, 1, 0]]), [[1, -0.2, 0], [0, 1, 0]])
    assert close(sheared[24:40, 24:40], image[24:40, 24:40], 4)
    assert (rotate(image, 21.0)[0, 0] == FILL).all()


def test_randaugment_applies_operations_half_of_the_time():
    one_operation = PLAIN.model_copy(update={"num_ops": 1, "magnitude": 7})
    image, unchanged = picture(), 0
    assert (augment(image, PLAIN, 64, CounterRandom(1), True) == image).all()
    for key in range(2000):
        unchanged += (augment(image, one_operation, 64, CounterRandom(hash64(key)), True) == image).all()
    assert abs(unchanged / 2000 - (0.5 + 0.5 / len(NAMES))) < 0.05  # not applied, or Identity


def test_augmentation_depends_on_the_key_alone():
    config = AugmentConfig()
    one, again, other = (augment(picture(), config, 32, CounterRandom(key), True) for key in (3, 3, 4))
    assert (one == again).all()
    assert (one != other).any()
    assert one.shape == (32, 32, 3)


def test_flips_mirror_half_of_the_images_if_allowed():
    config = PLAIN.model_copy(update={"flip": True})
    base = augment(picture(), PLAIN, 64, CounterRandom(0), True)
    ratio = 0
    for key in range(200):
        plain = augment(picture(), PLAIN, 64, CounterRandom(hash64(key)), True)
        assert (augment(picture(), config, 64, CounterRandom(hash64(key)), False) == plain).all()
        ratio += (augment(picture(), config, 64, CounterRandom(hash64(key)), True) == plain[:, ::-1]).all()
    assert base.shape == (64, 64, 3)
    assert 70 < ratio < 130


def test_allowing_flips_changes_nothing_but_the_flip():
    config = AugmentConfig(num_ops=0)
    for key in range(30):
        allowed, forbidden = (
            augment(picture(), config, 32, CounterRandom(hash64(key)), flip) for flip in (True, False)
        )
        assert (allowed == forbidden).all() or (allowed == forbidden[:, ::-1]).all()


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a dog to the left of a cat", True),
        ("the RIGHT hand", True),
        ("leftmost house", True),
        ("a right-handed player", True),
        ("a bright copyright sign", False),
        ("leftovers on a plate", False),
        ("a dog above a cat", False),
        ("", False),
    ],
)
def test_captions_that_mention_a_side_are_found(caption, said):
    assert (SIDES.search(caption) is not None) is said


@pytest.mark.parametrize(("right", "down"), [(7, 0), (-7, 0), (0, 5), (0, -5)])
def test_whole_pixel_shifts_equal_warps(right: int, down: int):
    image = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    horizontal = right != 0
    moved = translate(image, right / 32 if horizontal else down / 40, horizontal)
    assert np.array_equal(moved, warp(image, [[1, 0, right], [0, 1, down]]))
