"""Image decoding to uint8 pixels, random crops, and resizing to a square or with the aspect ratio kept.

Images are (H, W, 3) RGB.

JPEGs are decoded by simplejpeg (libjpeg-turbo, strict: a corrupt file raises instead of decoding to noise). Where it
fails, the file is decoded again without its metadata, and by Pillow where simplejpeg does not know the chroma
sampling: damaged metadata does not make an image bad, damaged pixels do. Other formats are decoded by Pillow; of
several frames the first is used. `measure` reads the size of what `decode` returns from the header alone.

Resizing is torch's antialiased bicubic or bilinear on uint8, five times as fast as Pillow's. Rows are resized before
columns, as Pillow does up to version 12, whose pixels ours equal within 2 grey levels. Pillow 13 resizes columns first
where that is cheaper, for many portrait images: rounding and clipping between the two passes then differ, by up to 5
levels in photos and more at sharp edges.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.config.schema import Interpolation, TransformerConfig, ViLTConfig
from pipeline.data.contents import jpeg
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import CounterRandom

FORMATS: dict[str, tuple[str, ...]] = {  # Pillow's names with their file extensions, the usual one first
    "JPEG": ("jpg", "jpeg", "jfif", "jpe", "pjpeg", "pjp"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif", "avifs"),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
MAX_SIDE = 65_500  # pixels; a JPEG has at most 65,535
MAX_ASPECT = 200  # longer side by shorter side
STRIP = 1 << 20  # pixels converted at a time
RATIO = (3 / 4, 4 / 3)  # of a random crop's sides
CROP_ATTEMPTS = 10
ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # orientations that exchange height and width
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_WEBP_METADATA = 0x2C  # VP8X's flags for ICC profile, EXIF and XMP


def format_of(data: bytes) -> str | None:
    """Return the name in FORMATS of an encoded image, by its first bytes; None for anything else."""
    if data[:2] == jpeg.SOI:
        return "JPEG"
    if data[:8] == _PNG_SIGNATURE:
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM":
        return "BMP"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if data[4:8] == b"ftyp" and (brands := data[8 : min(64, int.from_bytes(data[:4], "big"))]):
        return "AVIF" if b"avif" in brands or b"avis" in brands else None
    return None


@dataclass(frozen=True)
class ImageSize:
    """The size of an encoded image in pixels after its EXIF rotation, and whether it has further frames (not read)."""

    height: int
    width: int
    is_animated: bool = False


def measure(data: bytes) -> ImageSize:
    """Return an image's size from its header, without decoding. Raises BadSample for anything that is not an image."""
    with _judging(data):
        if _known_format(data) == "JPEG":
            header = jpeg.read_header(data)
            return _upright_size(header.height, header.width, _orientation(data))
        return _with_repair(data, _measure_with_pillow)


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """Return the image as (H, W, 3) uint8 RGB, rotated by its EXIF orientation, transparent parts over white.

    Raises BadSample("image", reason) when the bytes are damaged, of another format, or too costly to decode: more than
    `max_pixels`, a side or an aspect ratio out of bounds, hundreds of scans. The header's size is checked before
    decoding.
    """
    with _judging(data):
        if _known_format(data) == "JPEG":
            return _decode_jpeg(data, max_pixels)
        return _with_repair(data, lambda encoded: _decode_with_pillow(encoded, max_pixels))


@dataclass(frozen=True)
class KeepAspectRatio:
    """Resizing that keeps the aspect ratio (ViLT, section 4.1), up to `shorter` and `longest` pixels of the sides.

    Both sides are then cut to multiples of `patch`. The paper's 384 and 640 give at most 384 x 640 pixels, 240 patches;
    the release's longest side is int(1333 / 800 * 384) = 639, which is cut to 608, 228 patches. Every side has at least
    one patch, unlike in the release for images 20 times as long as wide.
    """

    shorter: int
    longest: int
    patch: int

    @property
    def canvas(self) -> int:
        """The side of the square that holds every image."""
        return self.longest // self.patch * self.patch

    @property
    def num_patches(self) -> int:
        """The number of patches of the largest image."""
        return (self.shorter // self.patch) * (self.longest // self.patch)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image is resized to."""
        scale = min(self.shorter / min(height, width), self.longest / max(height, width))
        rows, columns = (round(side * scale) // self.patch for side in (height, width))
        return max(1, rows) * self.patch, max(1, columns) * self.patch


Shape = int | KeepAspectRatio  # the side of a square that images are stretched to, or their own aspect ratio


def shape_of(model: TransformerConfig) -> Shape:
    """Return the shape in which a model reads images."""
    if isinstance(model, ViLTConfig):
        return KeepAspectRatio(model.image_size, model.longest_side, model.patch_size)
    return model.image_size


def resize(image: np.ndarray, shape: Shape, interpolation: Interpolation = "bicubic") -> np.ndarray:
    """Return the whole image in a shape, stretched if that is a square, as the published models evaluate."""
    sides = shape.sides(*image.shape[:2]) if isinstance(shape, KeepAspectRatio) else (shape, shape)
    return _resized(image, *sides, interpolation)


def resize_for(image: np.ndarray, model: TransformerConfig) -> np.ndarray:
    """Return the whole image in the shape and with the interpolation that a model reads."""
    return resize(image, shape_of(model), model.interpolation)


def _resized(image: np.ndarray, height: int, width: int, interpolation: Interpolation) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    # The batch dimension must be added before permuting, or torch misses the channels-last layout of its fast kernel.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (height, width), mode=interpolation, align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def put_on_canvas(image: np.ndarray, canvas: np.ndarray) -> None:
    """Write an image to the top left of a canvas (S, S, 3) at least as large; the rest becomes black."""
    height, width = image.shape[:2]
    canvas[:height, :width] = image
    canvas[height:] = 0
    canvas[:height, width:] = 0


def on_one_canvas(pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return images padded to the tallest and widest, (B, H, W, 3) uint8, and their sizes, (B, 2) int64."""
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
    """Return a random crop of the image in a shape; `scale` bounds the crop's fraction of the area.

    For a square the crop's aspect ratio is in 3/4 … 4/3; with the aspect ratio kept it is that of the image, and a
    scale of (1, 1) crops nothing.
    """
    draw = _draw_same_ratio if isinstance(shape, KeepAspectRatio) else draw_crop
    top, left, height, width = draw(image.shape[0], image.shape[1], scale, random)
    return resize(image[top : top + height, left : left + width], shape, interpolation)


def _draw_same_ratio(
    height: int, width: int, scale: tuple[float, float], random: CounterRandom
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) with the image's own ratio: area uniform in `scale`, position uniform."""
    side = math.sqrt(scale[0] + (scale[1] - scale[0]) * random.uniform())
    crop_height, crop_width = max(1, round(side * height)), max(1, round(side * width))
    top, left = random.integer(height - crop_height + 1), random.integer(width - crop_width + 1)
    return top, left, crop_height, crop_width


def draw_crop(height: int, width: int, scale: tuple[float, float], random: CounterRandom) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width): area uniform in `scale`, ratio log-uniform in 3/4 … 4/3, position uniform.

    A crop that does not fit is drawn again; after ten tries the largest centred crop of an allowed ratio is returned.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * random.uniform())
        ratio = math.exp(low + (high - low) * random.uniform())
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = random.integer(height - crop_height + 1), random.integer(width - crop_width + 1)
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * RATIO[1])))
    crop_height = min(height, max(1, round(width / RATIO[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@contextmanager
def _judging(data: bytes) -> Iterator[None]:
    """Turn every exception of a decoder into BadSample: damaged files make parsers fail in many ways."""
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise BadSample("image", f"corrupt {format_of(data) or 'image'}: {reason}") from error


def _known_format(data: bytes) -> str:
    name = format_of(data)
    if name is None:
        raise BadSample("image", f"not a {', '.join(FORMATS)} (begins with {data[:8]!r})")
    return name


def _refuse_costly(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample("image", f"decompression bomb: {width} x {height} is more than {max_pixels} pixels")
    if max(height, width) > min(MAX_SIDE, MAX_ASPECT * min(height, width)):
        raise BadSample(
            "image",
            f"{width} x {height} pixels; expected sides up to {MAX_SIDE} and an aspect ratio up to {MAX_ASPECT}",
        )


def _upright_size(height: int, width: int, orientation: object, is_animated: bool = False) -> ImageSize:
    if orientation in _TRANSPOSED:
        height, width = width, height
    return ImageSize(height, width, is_animated)


# JPEG -----------------------------------------------------------------------------------------------------------------


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray:
    header = jpeg.read_header(data)
    _refuse_costly(header.height, header.width, max_pixels)
    is_cmyk = len(header.components) == 4  # or YCCK: libjpeg-turbo converts neither
    image = None if is_cmyk else _decode_plain_jpeg(data, header)
    if image is None:
        _refuse_many_scans(data)
        image = _decode_odd_jpeg(data, "CMYK" if is_cmyk else "RGB")
    if image.shape != (header.height, header.width, 3):
        raise BadSample("image", f"decoded to {image.shape}, but its header says {header.height} x {header.width}")
    return _upright(image, _orientation(data))


def _decode_plain_jpeg(data: bytes, header: jpeg.Header) -> np.ndarray | None:
    """Return the pixels by the fast, strict decoder; None where it fails."""
    if not jpeg.has_one_scan(data, header):  # counting scans reads the whole file, 7 % of the decoding time
        _refuse_many_scans(data)
    try:
        image: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
    except Exception:
        return None
    return image


def _refuse_many_scans(data: bytes) -> None:
    if jpeg.has_too_many_scans(data):
        raise BadSample("image", f"more than {jpeg.MAX_SCANS} scans, each of which costs a pass over all pixels")


def _decode_odd_jpeg(data: bytes, colours: str) -> np.ndarray:
    """Decode what simplejpeg refuses or cannot convert, if its entropy-coded data is intact."""
    plain = jpeg.without_metadata(data)
    try:
        simplejpeg.decode_jpeg_header(plain)
    except KeyError:  # a chroma sampling that the header call has no name for, which is decoded all the same
        is_known = True
    except ValueError:
        is_known = False
    else:
        is_known = True
    if is_known:
        image: np.ndarray = simplejpeg.decode_jpeg(plain, colours)
        if colours == "RGB":
            return image
    else:
        jpeg.check_entropy(plain)
    with Image.open(io.BytesIO(plain), formats=("JPEG",)) as picture:
        return _rgb(picture)


def _orientation(data: bytes) -> object:
    """Return a JPEG's EXIF orientation, 1 where there is none. Damaged metadata does not make the image bad."""
    payload = jpeg.exif_of(data)
    if payload is None:
        return 1
    try:
        exif = Image.Exif()
        exif.load(payload)
        return exif.get(ORIENTATION, 1)
    except Exception:
        return 1


# Other formats --------------------------------------------------------------------------------------------------------

Result = TypeVar("Result")


def _with_repair(data: bytes, read: Callable[[bytes], Result]) -> Result:
    """Return the result of `read` on the image or, if it fails, on the image without its metadata."""
    try:
        return read(data)
    except BadSample:
        raise
    except Exception:
        repaired = _without_metadata(data)
        if repaired == data:
            raise
        return read(repaired)


def _measure_with_pillow(data: bytes) -> ImageSize:
    with _opened(data) as picture:
        width, height = picture.size
        try:
            is_animated = bool(getattr(picture, "is_animated", False))
        except Exception:  # a damaged second frame
            is_animated = True
        return _upright_size(height, width, _pillow_orientation(picture), is_animated)


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    with _opened(data) as picture:
        width, height = picture.size
        _refuse_costly(height, width, max_pixels)
        if picture.format == "PNG":
            _check_png(data)
        orientation = _pillow_orientation(picture)
        image = _rgb(picture)
    if image.shape != (height, width, 3):
        raise BadSample("image", f"decoded to {image.shape}, but its header says {height} x {width}")
    return _upright(image, orientation)


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=(_known_format(data),))


def _pillow_orientation(picture: Image.Image) -> object:
    if picture.format == "TIFF":  # Pillow rotates these itself
        return 1
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata does not make the image bad
        return 1


def _rgb(picture: Image.Image) -> np.ndarray:
    """Return (H, W, 3) uint8 of an image of any mode, converted in strips to bound the memory for copies."""
    picture.load()
    width, height = picture.size
    image = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(height, top + rows)))
        image[top : top + rows] = _rgb_strip(strip)
    return image


def _rgb_strip(strip: Image.Image) -> np.ndarray:
    if strip.mode.startswith("I;16"):
        pixels = np.asarray(strip).astype(np.uint16)
        grey = (pixels >> 8).astype(np.uint8)
        if "transparency" in strip.info:
            grey[pixels == strip.info["transparency"]] = 255
        return grey[:, :, None]
    if strip.mode in ("I", "F"):
        raise BadSample("image", "its pixels are 32-bit numbers of unknown range; expected 8 or 16 bits per channel")
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        strip = Image.alpha_composite(white, strip)
    return np.asarray(strip.convert("RGB"))


def _without_metadata(data: bytes) -> bytes:
    """Return a PNG or WebP without the chunks that say nothing of its pixels; other formats as they are."""
    if data[:8] == _PNG_SIGNATURE:
        return _PNG_SIGNATURE + b"".join(
            chunk
            for name, chunk in _png_chunks(data)
            if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and _is_intact(chunk))
        )
    if data[:4] == b"RIFF":
        body = b"WEBP" + b"".join(_webp_chunks(data))
        return b"RIFF" + len(body).to_bytes(4, "little") + body
    return data


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each chunk's name and bytes: length, name, content, checksum. A name in capitals is a critical chunk's.

    What follows the end chunk is no part of the image.
    """
    at = len(_PNG_SIGNATURE)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        yield name, data[at:end]
        if name == b"IEND":
            return
        at = end


def _is_intact(chunk: bytes) -> bool:
    length = 12 + int.from_bytes(chunk[:4], "big")
    return len(chunk) == length and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _check_png(data: bytes) -> None:
    """Raise BadSample for damaged pixels: Pillow ignores their checksums and returns noise."""
    for name, chunk in _png_chunks(data):
        if name[:1].isupper() and not _is_intact(chunk):
            raise BadSample(
                "image", f"corrupt PNG: the checksum of its {name.decode('latin-1')} is wrong, or it is cut"
            )


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the chunks of the pixels, and of the animation; VP8X, which announces the others, no longer does."""
    at = 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        name = data[at : at + 4]
        chunk = data[at : end + end % 2]
        if name == b"VP8X" and len(chunk) > 8:
            yield chunk[:8] + bytes([chunk[8] & ~_WEBP_METADATA]) + chunk[9:]
        elif name in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            yield chunk
        at = end + end % 2


def _upright(image: np.ndarray, orientation: object) -> np.ndarray:
    """Apply the EXIF orientation: values 2 to 8 are the seven rotations and mirrorings."""
    if orientation in _TRANSPOSED:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
