"""Decoding: every kind of picture people have, upright and over white; bad ones refused; crops and resizing."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.config.model import ViTConfig
from pipeline.data.contents.images import (
    RATIO,
    OwnShape,
    decode,
    draw_crop,
    random_resized_crop,
    resize,
    resize_for,
)
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import CounterRandom, hash64

SHARED = Path(__file__).resolve().parents[4] / ".." / "shared"
LIMIT = 1_000_000


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    """Smooth and different in every direction, so that a turned copy is another picture."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 9) * np.cos(y / 7)], axis=2)
    return image.astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_pictures_come_back_exactly(kind, options):
    image = picture()
    assert (decode(encoded(image, kind, **options), LIMIT) == image).all()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True, "restart_marker_rows": 1}]
)
def test_jpegs_decode_to_what_was_encoded(options):
    data = encoded(picture(), "JPEG", quality=95, **options)
    assert psnr(decode(data, LIMIT), np.array(Image.open(io.BytesIO(data)))) > 40


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_colour_mode_becomes_rgb(mode, kind):
    if (mode, kind) in [("1", "JPEG"), ("P", "JPEG"), ("I;16", "JPEG"), ("CMYK", "PNG")]:
        pytest.skip(f"{kind} has no mode {mode}")
    source = Image.fromarray(picture())
    if mode == "I;16":
        grey = np.array(source.convert("L")).astype(np.uint16) * 257
        image, expected = Image.fromarray(grey), np.repeat((grey >> 8)[:, :, None], 3, axis=2)
    else:
        image = source.convert(mode)
        expected = np.array(image.convert("RGB"))
    found = decode(encoded(image, kind), LIMIT)
    assert found.shape == (60, 90, 3)
    assert found.dtype == np.uint8
    assert psnr(found, expected) > 30


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_what_is_transparent_is_white(kind, options):
    pixels = np.dstack([np.zeros((10, 10, 3), np.uint8), np.full((10, 10), 255, np.uint8)])
    pixels[:, :5, 3] = 0
    found = decode(encoded(Image.fromarray(pixels), kind, **options), LIMIT)
    assert (found[:, :5] == 255).all()
    assert (found[:, 5:] == 0).all()


def test_a_transparent_palette_colour_is_white():
    image = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert (decode(encoded(image, "PNG", transparency=0), LIMIT) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_picture_stands_upright(kind, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif, **options)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    found = decode(data, LIMIT)
    assert found.shape == upright.shape
    assert psnr(found, upright) > 40
    assert found.flags.c_contiguous


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_bad(kind):
    data = encoded(picture(300, 300), kind)
    for share in (0.02, 0.3, 0.9):
        with pytest.raises(BadSample) as error:
            decode(data[: int(len(data) * share)], LIMIT)
        assert error.value.stage == "image"
        assert error.value.reason


def test_a_jpeg_with_damaged_bytes_is_bad_where_lenient_decoders_return_noise():
    data = bytearray(encoded(picture(300, 300), "JPEG", quality=90))
    data[len(data) // 2 : len(data) // 2 + 3] = b"\xff\xd3\x77"
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
    with pytest.raises(BadSample, match="corrupt"):
        decode(bytes(data), LIMIT)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"hello, I am text", encoded(picture(), "GIF"), encoded(picture(), "BMP")]
)
def test_what_is_no_jpeg_png_or_webp_is_bad(data):
    with pytest.raises(BadSample):
        decode(data, LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_above_the_pixel_limit_is_a_bomb(kind):
    data = encoded(picture(100, 100), kind)
    assert decode(data, 10_000).shape == (100, 100, 3)
    with pytest.raises(BadSample, match="bomb"):
        decode(data, 9_999)


def test_a_bomb_is_refused_by_its_header_alone():
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"never read")
    with pytest.raises(BadSample, match="bomb"):
        decode(png, LIMIT)


@pytest.mark.parametrize(("height", "width", "size"), [(480, 640, 224), (50, 40, 224), (333, 500, 96), (224, 224, 64)])
def test_resizing_equals_pillows_bicubic(height, width, size):
    image = picture(height, width)
    expected = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    found = resize(image, size)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert psnr(found, expected) > 45


def test_resizing_a_photo_equals_pillows_bicubic():
    photos = sorted((SHARED / "data" / "photos_300" / "images").glob("*.jpg"))[:5]
    if not photos:
        pytest.skip("../shared/data/photos_300 is absent")
    for photo in photos:
        image = decode(photo.read_bytes(), LIMIT)
        expected = np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
        assert psnr(resize(image, 224), expected) > 45


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [
        (640, 480, 384),
        (1200, 300, 224),
        (500, 384, 300),
        (300, 2000, 224),
        (480, 640, OwnShape(384, 639, 32)),
        (40, 30, 64),
    ],
)
def test_resizing_equals_pillows_passes_over_rows_and_then_columns(height, width, shape, interpolation):
    """Within 2 grey levels, at any shape and for the sharpest edges: Pillow's order up to version 12."""
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    for image in (noise, picture(height, width)):
        found = resize(image, shape, interpolation)
        rows = Image.fromarray(image).resize((found.shape[1], height), kernel)
        expected = np.array(rows.resize((found.shape[1], found.shape[0]), kernel))
        assert np.abs(found.astype(int) - expected).max() <= 2


def test_a_model_reads_images_by_its_own_interpolation():
    image = picture(90, 70)
    for interpolation in ("bicubic", "bilinear"):
        model = ViTConfig(image_size=32, interpolation=interpolation)
        assert (resize_for(image, model) == resize(image, 32, interpolation)).all()
    assert (resize(image, 32, "bicubic") != resize(image, 32, "bilinear")).any()


def test_a_crop_of_a_view_resizes_like_its_copy():
    view = picture(200, 300)[20:150, 31:222]
    assert (resize(view, 64) == resize(view.copy(), 64)).all()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (224, 224)])
def test_crops_keep_to_their_scale_and_ratio(height, width):
    for key in range(500):
        top, left, crop_height, crop_width = draw_crop(height, width, (0.5, 1.0), CounterRandom(hash64(key)))
        assert 0 <= top <= height - crop_height
        assert 0 <= left <= width - crop_width
        assert RATIO[0] * 0.98 <= crop_width / crop_height <= RATIO[1] * 1.02
        assert 0.49 <= crop_height * crop_width / (height * width) <= 1.0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (7, 3), (20, 2000)])
def test_pictures_of_any_shape_are_cropped(height, width):
    for key in range(20):
        crop = random_resized_crop(picture(height, width), 32, (0.5, 1.0), CounterRandom(key))
        assert crop.shape == (32, 32, 3)


def test_a_crop_is_decided_by_its_key():
    one, again, other = (random_resized_crop(picture(), 32, (0.2, 1.0), CounterRandom(key)) for key in (5, 5, 6))
    assert (one == again).all()
    assert (one != other).any()
