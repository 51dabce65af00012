"""Augmentation: VLMo's ten operations at the published magnitudes, with counter-based randomness."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from pipeline.config.load import load_config
from pipeline.config.schema import AugmentConfig
from pipeline.data.examples import augment as module
from pipeline.data.examples.augment import FILL, NAMES, OPERATIONS, augment, translate, warp
from pipeline.data.randomness import CounterRandom, hash64

RECIPES = sorted(Path(__file__).parents[4].glob("configs/finetune/vilt_*.yaml"))
PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), flip=False, num_ops=0)


def picture(size: int = 64) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    return np.stack([40 + 170 * x, 60 + 120 * y, 120 + 60 * np.sin(9 * x) * np.cos(7 * y)], axis=2).astype(np.uint8)


def augmented(key: int, config: AugmentConfig, size: int = 64, flip: bool = True) -> np.ndarray:
    return augment(picture(), config, size, CounterRandom(hash64(key)), flip)


def test_each_of_vlmos_ten_operations_has_the_effect_of_its_published_magnitude() -> None:
    """ViLT's list of operations and ranges gives value = 9 / 30 * (largest - smallest) + smallest."""
    assert (module.SHEAR, module.TRANSLATE, module.ROTATE, module.ENHANCE) == (0.3, 10 / 224, 30.0, (0.1, 1.9))
    strengths = {load_config(path).data.augment.magnitude / module.MAX_MAGNITUDE for path in RECIPES}
    for strength in strengths or pytest.fail("no recipe of ViLT"):
        assert strength == pytest.approx(9 / 30), "so every value is the published one"
    image = picture()
    expected = {
        ("Identity", 0.7, 1): image,
        ("AutoContrast", 0.7, 1): module.auto_contrast(image),
        ("Equalize", 0.7, 1): OPERATIONS["Equalize"](image, 0.0, -1),
        ("Brightness", 0.5, 1): image,
        ("Sharpness", 0.7, 1): module.sharpness(image, 1.36),
        ("ShearX", 0.7, -1): warp(image, [[1, -0.7 * 0.3, 0], [0, 1, 0]]),
        ("ShearY", 0.7, 1): warp(image, [[1, 0, 0], [0.7 * 0.3, 1, 0]]),
        ("TranslateX", 1.0, 1): translate(image, 10 / 224, True),
        ("TranslateY", 1.0, -1): translate(image, -10 / 224, False),
        ("Rotate", 0.7, -1): warp(image, degrees=-21.0),
    }
    assert {name for name, *_ in expected} == set(NAMES)
    for (name, strength, sign), result in expected.items():
        changed = OPERATIONS[name](image, strength, sign)
        assert np.array_equal(changed, result), name
        assert (changed.shape, changed.dtype, np.array_equal(image, picture())) == (image.shape, np.uint8, True)


def test_colour_operations_agree_with_pillow() -> None:
    image, flat = picture(512), np.full((16, 16, 3), 77, np.uint8)
    pillow = Image.fromarray(image)
    for name, factor, expected, by in (
        ("AutoContrast", 1.0, ImageOps.autocontrast(pillow), 1),
        ("Equalize", 1.0, ImageOps.equalize(pillow), 4),  # the two round histograms differently
        *(("Brightness", factor, ImageEnhance.Brightness(pillow).enhance(factor), 1) for factor in (1.36, 0.3)),
        *(("Sharpness", factor, ImageEnhance.Sharpness(pillow).enhance(factor), 1) for factor in (1.9, 0.1)),
    ):
        strength = (factor - 0.1) / 1.8
        assert np.abs(OPERATIONS[name](image, strength, 1).astype(int) - np.array(expected)).max() <= by, name
        assert name == "Brightness" or (OPERATIONS[name](flat, strength, 1) == flat).all()


def test_geometric_operations_fill_with_grey_and_shift_whole_pixels_exactly() -> None:
    image = picture()
    filled = np.concatenate([np.broadcast_to(np.uint8(FILL), (64, 8, 3)), image[:, :-8]], axis=1)
    assert (translate(image, 8 / 64, True) == filled).all()
    assert (warp(image, degrees=90.0) == np.rot90(image)).all()
    assert (warp(image, degrees=21.0)[0, 0] == FILL).all()
    sheared = warp(warp(image, [[1, 0.2, 0], [0, 1, 0]]), [[1, -0.2, 0], [0, 1, 0]])
    assert np.abs(sheared[24:40, 24:40].astype(int) - image[24:40, 24:40]).max() <= 4
    for right, down in ((7, 0), (-7, 0), (0, 5), (0, -5)):
        shifted = translate(image, (right + down) / 64, horizontal=right != 0)
        assert np.array_equal(shifted, warp(image, [[1, 0, right], [0, 1, down]]))


def test_key_alone_decides_and_half_of_the_operations_and_flips_are_applied() -> None:
    one_operation, flipping = (PLAIN.model_copy(update=keys) for keys in ({"num_ops": 1, "magnitude": 7}, {"flip": 1}))
    assert (augmented(1, PLAIN) == picture()).all()
    unchanged = sum(bool((augmented(key, one_operation) == picture()).all()) for key in range(2000))
    assert abs(unchanged / 2000 - (0.5 + 0.5 / len(NAMES))) < 0.05  # not applied, or Identity
    first, again, other = (augmented(key, AugmentConfig(), 32) for key in (3, 3, 4))
    assert (first.shape, np.array_equal(first, again), np.array_equal(first, other)) == ((32, 32, 3), True, False)
    assert 70 < sum(bool((augmented(key, flipping) == picture()[:, ::-1]).all()) for key in range(200)) < 130
    assert all((augmented(key, flipping, flip=False) == picture()).all() for key in range(200))
    for key in range(30):  # flips change nothing else
        allowed, forbidden = (augmented(key, AugmentConfig(num_ops=0), 32, flip) for flip in (True, False))
        assert (allowed == forbidden).all() or (allowed == forbidden[:, ::-1]).all()
    for caption in ("a dog to the left of a cat", "the RIGHT hand", "leftmost house", "a right-handed player"):
        assert module.SIDES.search(caption), caption
    for caption in ("a bright copyright sign", "leftovers on a plate", "a dog above a cat", ""):
        assert not module.SIDES.search(caption), caption
