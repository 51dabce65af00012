"""Encoded pictures to uint8 pixels: decoding, random-resized crops, square resizing. Images are (H, W, 3) RGB.

JPEG goes through simplejpeg (libjpeg-turbo, strict: a byte-corrupted file raises instead of decoding to noise);
everything else through Pillow. Resizing is torch's antialiased bicubic on uint8, which is five times as fast as
Pillow's and equal to it within rounding.
"""

from __future__ import annotations

import io
import math

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import CounterRandom

FORMATS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
RATIO = (3 / 4, 4 / 3)  # of a random crop's sides
CROP_ATTEMPTS = 10
ORIENTATION = 0x0112  # the EXIF tag


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """The picture as it is meant to be seen: (H, W, 3) uint8 RGB, upright, over white where it is transparent.

    Raises BadSample("image", reason) when the bytes are damaged, of another format, or would decode to more
    than `max_pixels`. The size is read from the header, before anything is decoded.
    """
    if data[:2] == b"\xff\xd8":
        return _decode_jpeg(data, max_pixels)
    return _decode_with_pillow(data, max_pixels)


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """The whole picture as (size, size, 3), stretched: what the published models evaluate on."""
    if image.shape[:2] == (size, size):
        return image
    # The batch dimension first: permuted before it is added, torch would not see channels-last, its fast kernel's way.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def random_resized_crop(image: np.ndarray, size: int, scale: tuple[float, float], random: CounterRandom) -> np.ndarray:
    """A random part of the picture, as (size, size, 3): `scale` bounds its share of the area."""
    top, left, height, width = draw_crop(image.shape[0], image.shape[1], scale, random)
    return resize_square(image[top : top + height, left : left + width], size)


def draw_crop(height: int, width: int, scale: tuple[float, float], random: CounterRandom) -> tuple[int, int, int, int]:
    """(top, left, height, width): area uniform in `scale`, ratio log-uniform in 3/4 … 4/3, place uniform.

    A crop that does not fit is drawn again; after ten tries the largest centred one of a legal ratio is taken.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * random.uniform())
        ratio = math.exp(low + (high - low) * random.uniform())
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = random.integer(height - crop_height + 1), random.integer(width - crop_width + 1)
            return top, left, crop_height, crop_width
    return _centred_crop(height, width)


def _centred_crop(height: int, width: int) -> tuple[int, int, int, int]:
    crop_width = min(width, max(1, round(height * RATIO[1])))
    crop_height = min(height, max(1, round(width / RATIO[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_bomb(width, height, max_pixels)
        if colours in ("CMYK", "YCCK"):  # libjpeg-turbo does not convert these
            return _decode_with_pillow(data, max_pixels)
        image = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        raise BadSample("image", f"corrupt JPEG: {error}") from error
    return _upright(image, _orientation(data))


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _refuse_bomb(*picture.size, max_pixels)
            orientation = picture.getexif().get(ORIENTATION, 1)
            return _upright(_rgb(picture), orientation)
    except BadSample:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadSample("image", f"not a JPEG, PNG or WebP (begins with {data[:8]!r})") from error
    except Image.DecompressionBombError as error:
        raise BadSample("image", f"decompression bomb: {error}") from error
    except Exception as error:  # damaged files reach Pillow's parsers in every shape: OSError, SyntaxError, struct…
        raise BadSample("image", f"corrupt image: {type(error).__name__}: {error}") from error


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample("image", f"decompression bomb: {width} x {height} is more than {max_pixels} pixels")


def _rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16-bit grey: convert() would clip it to white
        grey = np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))


def _orientation(data: bytes) -> int:
    """A JPEG's EXIF orientation, 1 where there is none. Damaged metadata does not make the picture bad."""
    if not _has_exif(data):  # opening it with Pillow costs more than this look
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            return picture.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _has_exif(data: bytes) -> bool:
    """Whether one of the segments before the picture (APP0 … APP15, comments) is EXIF."""
    at = 2
    while at + 4 < len(data) and data[at] == 0xFF and (0xE0 <= data[at + 1] <= 0xEF or data[at + 1] == 0xFE):
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\x00\x00":
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's rotation: EXIF values 2-8 are the seven ways to lay a picture wrongly."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
