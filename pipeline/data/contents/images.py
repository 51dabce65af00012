"""Image decoding to uint8 pixels (H, W, 3) RGB, random crops, and resizing to a square or at the own aspect ratio.

JPEGs are decoded by simplejpeg (libjpeg-turbo, strict: a corrupt file raises instead of decoding to noise). Where it
fails, the file is decoded again without its metadata: damaged metadata does not make an image bad, damaged pixels do.
Pillow decodes the chroma samplings that simplejpeg refuses, and other formats (the first frame). Resizing is torch's
antialiased bicubic or bilinear on uint8, five times as fast as Pillow's: rows before columns, as in Pillow up to
version 12, whose pixels ours equal within 2 grey levels.
"""

import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

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
    **{"WEBP": ("webp",), "GIF": ("gif",), "BMP": ("bmp", "dib"), "TIFF": ("tif", "tiff"), "AVIF": ("avif", "avifs")},
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
_SIGNATURES = {
    name: re.compile(signature, re.DOTALL)
    for name, signature in (
        ("JPEG", re.escape(jpeg.SOI)), ("PNG", re.escape(_PNG_SIGNATURE)), ("WEBP", rb"RIFF....WEBP"),
        ("GIF", rb"GIF8[79]a"), ("BMP", rb"BM"), ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    )
}  # fmt: skip
_WEBP_METADATA = 0x2C  # VP8X's flags for ICC profile, EXIF and XMP
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")  # chunks of the pixels, and of the animation


def format_of(data: bytes) -> str | None:
    """Return the name in FORMATS of an encoded image, by its first bytes; None for anything else."""
    for name, signature in _SIGNATURES.items():
        if signature.match(data):
            return name
    if data[4:8] == b"ftyp" and (brands := data[8 : min(64, int.from_bytes(data[:4], "big"))]):
        return "AVIF" if b"avif" in brands or b"avis" in brands else None
    return None


class ImageSize(NamedTuple):
    """The size of an encoded image in pixels after its EXIF rotation, and whether it has further frames (not read)."""

    height: int
    width: int
    is_animated: bool = False


def measure(data: bytes) -> ImageSize:
    """Return the size of what `decode` returns, from the header alone. Raises BadSample if that is no image's."""
    size, orientation, _ = _read(data, None)
    return size._replace(height=size.width, width=size.height) if orientation in _TRANSPOSED else size


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """Return the image as (H, W, 3) uint8 RGB, rotated by its EXIF orientation, transparent parts over white. Raises
    BadSample("image", reason) for bytes that are damaged, of another format, or (by the header) too costly to decode.
    """
    size, orientation, image = _read(data, max_pixels)
    assert image is not None
    if image.shape != (size.height, size.width, 3):
        raise BadSample("image", f"decoded to {image.shape}, but its header says {size.height} x {size.width}")
    # Orientations 2 to 8 are the seven rotations and mirrorings.
    image = image.transpose(1, 0, 2) if orientation in _TRANSPOSED else image
    image = image[::-1] if orientation in (3, 4, 7, 8) else image
    return np.ascontiguousarray(image[:, ::-1] if orientation in (2, 3, 6, 7) else image)


@dataclass(frozen=True)
class KeepAspectRatio:
    """Resizing that keeps the aspect ratio (ViLT, section 4.1): sides up to `shorter` and `longest`, cut to patches."""

    shorter: int
    longest: int
    patch: int

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


def resize_for(image: np.ndarray, model: TransformerConfig) -> np.ndarray:
    """Return the whole image in the shape and with the interpolation that a model reads.

    `image_fit: centre_crop` resizes the shorter side to the square's and keeps the centre, by Pillow: the same pixels
    as those of Hugging Face's CLIPImageProcessor.
    """
    shape = shape_of(model)
    if isinstance(shape, KeepAspectRatio) or model.image_fit == "stretch":
        return resize(image, shape, model.interpolation)
    shorter = min(image.shape[:2])
    height, width = (int(shape * side / shorter) for side in image.shape[:2])
    kernel = Image.Resampling[model.interpolation.upper()]
    top, left = (height - shape) // 2, (width - shape) // 2
    resized = np.asarray(Image.fromarray(image).resize((width, height), kernel))
    return np.ascontiguousarray(resized[top : top + shape, left : left + shape])


def resize(image: np.ndarray, shape: Shape, interpolation: Interpolation = "bicubic") -> np.ndarray:
    """Return the whole image in a shape, stretched if that is a square, as the published models evaluate."""
    sides = shape.sides(*image.shape[:2]) if isinstance(shape, KeepAspectRatio) else (shape, shape)
    if image.shape[:2] == sides:
        return image
    # The batch dimension must be added before permuting, or torch misses the channels-last layout of its fast kernel.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, sides, mode=interpolation, align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def on_one_canvas(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return images padded to the tallest and widest, (B, H, W, 3) uint8, and their sizes, (B, 2) int64."""
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    canvases = np.zeros((len(images), *sizes.max(axis=0).tolist(), 3), dtype=np.uint8)
    for image, canvas in zip(images, canvases, strict=True):
        canvas[: len(image), : image.shape[1]] = image
    return canvases, sizes


def draw_crop(
    height: int, width: int, shape: Shape, scale: tuple[float, float], random: CounterRandom
) -> tuple[int, int, int, int]:
    """Draw (top, left, rows, columns) of a crop, with fraction of the area uniform in `scale` and uniform place. A
    square's aspect ratio is log-uniform in 3/4 … 4/3, else the image's. After ten misfits, return the largest centred
    crop.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(CROP_ATTEMPTS):
        fraction = scale[0] + (scale[1] - scale[0]) * random.uniform()
        if isinstance(shape, KeepAspectRatio):
            side = math.sqrt(fraction)
            rows, columns = max(1, round(side * height)), max(1, round(side * width))
        else:
            area, ratio = height * width * fraction, math.exp(low + (high - low) * random.uniform())
            columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            return random.integer(height - rows + 1), random.integer(width - columns + 1), rows, columns
    rows, columns = min(height, max(1, round(width / RATIO[0]))), min(width, max(1, round(height * RATIO[1])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


_Stored = tuple[ImageSize, object, np.ndarray | None]  # size and pixels as stored, and the EXIF orientation


def _read(data: bytes, max_pixels: int | None) -> _Stored:
    """Read an encoded image, without its pixels if `max_pixels` is None. Every exception becomes a BadSample."""
    if (kind := format_of(data)) is None:
        raise BadSample("image", f"not a {', '.join(FORMATS)} (begins with {data[:8]!r})")
    try:
        if kind == "JPEG":
            return _read_jpeg(data, max_pixels)
        try:
            return _read_with_pillow(data, kind, max_pixels)
        except BadSample:
            raise
        except Exception:  # read again without metadata, which may be all that is damaged
            if (plain := _without_metadata(data, kind)) == data:
                raise
            return _read_with_pillow(plain, kind, max_pixels)
    except (BadSample, MemoryError):
        raise
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise BadSample("image", f"corrupt {kind}: {reason}") from error


def _refuse_costly(size: ImageSize, max_pixels: int) -> None:
    height, width = size.height, size.width
    if width * height > max_pixels:
        raise BadSample("image", f"decompression bomb: {width} x {height} is more than {max_pixels} pixels")
    if max(height, width) > min(MAX_SIDE, MAX_ASPECT * min(height, width)):
        bounds = f"sides up to {MAX_SIDE} and an aspect ratio up to {MAX_ASPECT}"
        raise BadSample("image", f"{width} x {height} pixels; expected {bounds}")


def _read_jpeg(data: bytes, max_pixels: int | None) -> _Stored:
    header = jpeg.read_header(data)
    size, orientation = ImageSize(header.height, header.width), 1
    if header.exif is not None:
        with suppress(Exception):  # damaged metadata
            exif = Image.Exif()
            exif.load(header.exif)
            orientation = exif.get(ORIENTATION, 1)
    if max_pixels is None:
        return size, orientation, None

    _refuse_costly(size, max_pixels)
    is_cmyk = header.num_components == 4  # or YCCK: libjpeg-turbo converts neither
    if not is_cmyk:
        if not header.has_one_scan:  # counting scans reads the whole file, 7 % of the decoding time
            jpeg.refuse_many_scans(data)
        with suppress(Exception):
            return size, orientation, simplejpeg.decode_jpeg(data, "RGB")

    # The strict decoder refuses the file as it is or cannot convert it: decode it without metadata.
    jpeg.refuse_many_scans(data)
    plain = jpeg.without_metadata(data)
    image: np.ndarray | None = None
    try:
        image = simplejpeg.decode_jpeg(plain, "CMYK" if is_cmyk else "RGB")
    except ValueError as error:
        if "subsampling" not in str(error):
            raise
    if image is None or is_cmyk:  # Pillow knows all samplings; without the strict decoder it reports cut files alone
        with Image.open(io.BytesIO(plain), formats=("JPEG",)) as picture:
            image = _rgb(picture)
    return size, orientation, image


def _read_with_pillow(data: bytes, kind: str, max_pixels: int | None) -> _Stored:
    with Image.open(io.BytesIO(data), formats=(kind,)) as picture:
        width, height = picture.size
        size, orientation = ImageSize(height, width), 1
        if max_pixels is None:
            try:
                size = ImageSize(height, width, bool(getattr(picture, "is_animated", False)))
            except Exception:  # a damaged second frame
                size = ImageSize(height, width, is_animated=True)
        else:
            _refuse_costly(size, max_pixels)
            for name, _, is_intact in _png_chunks(data) if kind == "PNG" else ():
                if name[:1].isupper() and not is_intact:  # Pillow ignores the checksums of pixels and returns noise
                    part = name.decode("latin-1")
                    raise BadSample("image", f"corrupt PNG: the checksum of its {part} is wrong, or it is cut")
        if kind != "TIFF":  # Pillow rotates TIFFs itself
            with suppress(Exception):  # damaged metadata
                orientation = picture.getexif().get(ORIENTATION, 1)
        return size, orientation, None if max_pixels is None else _rgb(picture)


def _without_metadata(data: bytes, kind: str) -> bytes:
    """Return a PNG or WebP with the chunks of its pixels alone; other formats unchanged."""
    if kind == "PNG":
        return _PNG_SIGNATURE + b"".join(
            chunk
            for name, chunk, is_intact in _png_chunks(data)
            if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and is_intact)
        )
    if kind != "WEBP":
        return data
    body, at = bytearray(b"WEBP"), 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        end += end % 2
        name, chunk = data[at : at + 4], data[at:end]
        if name == b"VP8X" and len(chunk) > 8:  # announces the other chunks
            body += chunk[:8] + bytes([chunk[8] & ~_WEBP_METADATA]) + chunk[9:]
        elif name in _WEBP_PIXELS:
            body += chunk
        at = end
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yield each chunk's name (in capitals: critical), its bytes, and whether it is whole and undamaged."""
    at, name = len(_PNG_SIGNATURE), b""
    while at + 8 <= len(data) and name != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name, chunk = data[at + 4 : at + 8], data[at:end]
        yield name, chunk, end <= len(data) and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        at = end


def _rgb(picture: Image.Image) -> np.ndarray:
    """Return (H, W, 3) uint8 of an image of any mode, converted in strips to bound the memory for copies."""
    picture.load()
    width, height = picture.size
    image, rows = np.empty((height, width, 3), dtype=np.uint8), max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(height, top + rows)))
        if strip.mode.startswith("I;16"):
            pixels = np.asarray(strip).astype(np.uint16)
            grey = (pixels >> 8).astype(np.uint8)
            if "transparency" in strip.info:
                grey[pixels == strip.info["transparency"]] = 255
            image[top : top + rows] = grey[:, :, None]
            continue
        if strip.mode in ("I", "F"):
            raise BadSample("image", "pixels are 32-bit numbers of unknown range; expected 8 or 16 bits per channel")
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip)
        image[top : top + rows] = np.asarray(strip.convert("RGB"))
    return image
