"""Encoded pictures to uint8 pixels: decoding, random crops, resizing to a square or within the picture's own shape.

Images are (H, W, 3) RGB.

JPEG goes through simplejpeg (libjpeg-turbo, strict: a byte-corrupted file raises instead of decoding to noise);
everything else through Pillow. Resizing is torch's antialiased bicubic or bilinear on uint8, five times as fast as
Pillow's. Rows are resized before columns, as Pillow does up to version 12, whose pixels ours equal within 2 grey
levels. Pillow 13 resizes columns first where that is cheaper, for many upright images: rounding and clipping between
the two passes then differ, by up to 5 levels in photos and more at sharp edges.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.config.model import Interpolation, TransformerConfig, ViLTConfig
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


@dataclass(frozen=True)
class OwnShape:
    """Pictures that keep their shape (ViLT, section 4.1): the shorter side as given, if the longer stays in bounds.

    Both are then cut to multiples of `patch`. The paper's 384 and 640 give at most 384 x 640 pixels, 240 patches; the
    release's longest side is int(1333 / 800 * 384) = 639, which is cut to 608, 228 patches. A side is never cut to
    nothing, as the release's is for pictures 20 times as long as wide.
    """

    shorter: int
    longest: int
    patch: int

    @property
    def canvas(self) -> int:
        """The side of a square that holds every picture."""
        return self.longest // self.patch * self.patch

    @property
    def num_patches(self) -> int:
        """Of the largest picture."""
        return (self.shorter // self.patch) * (self.longest // self.patch)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """What a picture of that height and width is resized to."""
        scale = min(self.shorter / min(height, width), self.longest / max(height, width))
        rows, columns = (round(side * scale) // self.patch for side in (height, width))
        return max(1, rows) * self.patch, max(1, columns) * self.patch


Shape = int | OwnShape  # the side of a square that pictures are stretched to; or each its own


def shape_of(model: TransformerConfig) -> Shape:
    """The shape in which a model reads pictures."""
    if isinstance(model, ViLTConfig):
        return OwnShape(model.image_size, model.longest_side, model.patch_size)
    return model.image_size


def resize(image: np.ndarray, shape: Shape, interpolation: Interpolation = "bicubic") -> np.ndarray:
    """The whole picture in a shape, stretched where that is a square: what the published models evaluate on."""
    sides = shape.sides(*image.shape[:2]) if isinstance(shape, OwnShape) else (shape, shape)
    return _resized(image, *sides, interpolation)


def resize_for(image: np.ndarray, model: TransformerConfig) -> np.ndarray:
    """Return the whole image as a model reads it: in its shape, by its interpolation."""
    return resize(image, shape_of(model), model.interpolation)


def _resized(image: np.ndarray, height: int, width: int, interpolation: Interpolation) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    # The batch dimension first: permuted before it is added, torch would not see channels-last, its fast kernel's way.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (height, width), mode=interpolation, align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def put_on_canvas(image: np.ndarray, canvas: np.ndarray) -> None:
    """Writes a picture to the top left of a canvas (S, S, 3) at least as large; the rest becomes black."""
    height, width = image.shape[:2]
    canvas[:height, :width] = image
    canvas[height:] = 0
    canvas[:height, width:] = 0


def on_one_canvas(pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of any shapes at the top left of canvases as large as the tallest and widest: (B, H, W, 3) uint8.

    And their own rows and columns: (B, 2) int64.
    """
    sizes = np.array([picture.shape[:2] for picture in pictures], dtype=np.int64)
    canvases = np.empty((len(pictures), *sizes.max(axis=0).tolist(), 3), dtype=np.uint8)
    for picture, canvas in zip(pictures, canvases, strict=True):
        put_on_canvas(picture, canvas)
    return canvases, sizes


def random_resized_crop(
    image: np.ndarray,
    shape: Shape,
    scale: tuple[float, float],
    random: CounterRandom,
    interpolation: Interpolation = "bicubic",
) -> np.ndarray:
    """A random part of the picture in a shape: `scale` bounds its share of the area.

    For a square its sides are in a ratio of 3/4 … 4/3; a picture that keeps its shape is cut in the same shape, and
    with a scale of (1, 1) not at all.
    """
    draw = _draw_alike if isinstance(shape, OwnShape) else draw_crop
    top, left, height, width = draw(image.shape[0], image.shape[1], scale, random)
    return resize(image[top : top + height, left : left + width], shape, interpolation)


def _draw_alike(
    height: int, width: int, scale: tuple[float, float], random: CounterRandom
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with the picture's own ratio: area uniform in `scale`, place uniform."""
    side = math.sqrt(scale[0] + (scale[1] - scale[0]) * random.uniform())
    crop_height, crop_width = max(1, round(side * height)), max(1, round(side * width))
    top, left = random.integer(height - crop_height + 1), random.integer(width - crop_width + 1)
    return top, left, crop_height, crop_width


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
