"""Training-time augmentation of (H, W, 3) uint8 RGB images: random-resized crop, flip, RandAugment (arXiv 1909.13719)
over the ten operations that leave colours as captions name them (VLMo, section 4). Magnitudes range to 10, as in VLMo's
recipe. ViLT's range to 30 over the same strengths, so that its 9 is 3 here.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from pipeline.config.schema import AugmentConfig, Interpolation
from pipeline.data.contents.images import Shape, draw_crop, resize
from pipeline.data.randomness import CounterRandom

MAX_MAGNITUDE = 10
APPLIED = 0.5  # probability of applying a drawn operation, as in VLMo's published recipe
FILL = (128, 128, 128)  # colour of the pixels that shears, translations and rotations uncover

# Strengths at magnitude 10; lower magnitudes scale linearly. Geometric operations take either sign with equal chance.
SHEAR = 0.3  # of the other coordinate
TRANSLATE = 10 / 224  # of the side: the published 10 pixels at 224, the same fraction at every resolution
ROTATE = 30.0  # degrees
ENHANCE = (0.1, 1.9)  # brightness and sharpness factors at magnitude 0 and 10; 1 leaves the image unchanged
# In a caption that mirroring the image may make false.
SIDES = re.compile(r"\b(left|right)(most|ward|wards|hand|side)?\b", re.IGNORECASE)


def augment(
    image: np.ndarray,
    config: AugmentConfig,
    shape: Shape,
    random: CounterRandom,
    allow_flip: bool,
    interpolation: Interpolation = "bicubic",
) -> np.ndarray:
    """Return a random crop of the image in a shape, flipped and augmented: (H, W, 3) uint8."""
    height, width = image.shape[:2]
    top, left, rows, columns = draw_crop(height, width, shape, config.crop_scale, random)
    image = resize(image[top : top + rows, left : left + columns], shape, interpolation)
    if random.uniform() < 0.5 and config.flip and allow_flip:
        image = cv2.flip(image, 1)
    for _ in range(config.num_ops):
        operation = OPERATIONS[NAMES[random.integer(len(NAMES))]]
        is_applied, sign = random.uniform() < APPLIED, 1.0 if random.uniform() < 0.5 else -1.0
        if is_applied:
            image = operation(image, config.magnitude / MAX_MAGNITUDE, sign)
    return image


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretch each channel to the whole range; constant channels are unchanged."""
    channels = []
    for channel in cv2.split(image):
        low, high, _, _ = cv2.minMaxLoc(channel)
        if low < high and high - low < 255:
            table = np.rint((np.arange(256) - low) * (255.0 / (high - low))).clip(0, 255)
            channel = cv2.LUT(channel, table.astype(np.uint8))
        channels.append(channel)
    return cv2.merge(channels)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with a smoothed image: 0 gives the smoothed image, 1 the image, more sharpens; border pixels stay."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
    mixed = cv2.addWeighted(image, factor, cv2.filter2D(image, -1, kernel), 1.0 - factor, 0.0)
    mixed[[0, -1]] = image[[0, -1]]
    mixed[:, [0, -1]] = image[:, [0, -1]]
    return mixed


def translate(image: np.ndarray, fraction: float, horizontal: bool) -> np.ndarray:
    """Translate by a fraction of the side, the same at every resolution."""
    height, width = image.shape[:2]
    right, down = (fraction * width, 0.0) if horizontal else (0.0, fraction * height)
    if abs(right - round(right)) < 1e-9 and abs(down - round(down)) < 1e-9:
        top, bottom = max(0, round(down)), max(0, -round(down))
        before, after = max(0, round(right)), max(0, -round(right))
        kept = image[bottom : height - top, after : width - before]
        return cv2.copyMakeBorder(kept, top, bottom, before, after, cv2.BORDER_CONSTANT, value=FILL)
    return warp(image, [[1, 0, right], [0, 1, down]])


def warp(image: np.ndarray, matrix: Sequence[Sequence[float]] | None = None, degrees: float = 0.0) -> np.ndarray:
    """Move the pixels by an affine matrix (2, 3), or rotate them counter-clockwise; interpolate bilinearly."""
    height, width = image.shape[:2]
    rotation = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    affine = rotation if matrix is None else np.asarray(matrix, dtype=np.float64)
    four = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)  # OpenCV warps four channels in half the time of three
    border: dict[str, Any] = {"borderMode": cv2.BORDER_CONSTANT, "borderValue": (*FILL, 0)}
    warped = cv2.warpAffine(four, affine, (width, height), flags=cv2.INTER_LINEAR, **border)
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


# Name → operation(image, strength 0 … 1, sign ±1).
OPERATIONS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "Identity": lambda image, strength, sign: image,
    "AutoContrast": lambda image, strength, sign: auto_contrast(image),
    "Equalize": lambda image, strength, sign: cv2.merge([cv2.equalizeHist(channel) for channel in cv2.split(image)]),
    "Brightness": lambda image, strength, sign: cv2.convertScaleAbs(image, alpha=np.interp(strength, (0, 1), ENHANCE)),
    "Sharpness": lambda image, strength, sign: sharpness(image, np.interp(strength, (0, 1), ENHANCE)),
    "ShearX": lambda image, strength, sign: warp(image, [[1, sign * strength * SHEAR, 0], [0, 1, 0]]),
    "ShearY": lambda image, strength, sign: warp(image, [[1, 0, 0], [sign * strength * SHEAR, 1, 0]]),
    "TranslateX": lambda image, strength, sign: translate(image, sign * strength * TRANSLATE, horizontal=True),
    "TranslateY": lambda image, strength, sign: translate(image, sign * strength * TRANSLATE, horizontal=False),
    "Rotate": lambda image, strength, sign: warp(image, degrees=sign * strength * ROTATE),
}
NAMES = tuple(OPERATIONS)
