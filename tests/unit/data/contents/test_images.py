"""Image decoding in every format and mode, refusal of bad images, crops and resizing."""

import io
import itertools
import os
import random
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pipeline.config.schema import AugmentConfig, ViTConfig
from pipeline.data.contents import images
from pipeline.data.contents.images import FORMATS, ImageSize, KeepAspectRatio, decode, measure, resize
from pipeline.data.examples.augment import augment
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import CounterRandom, hash64
from tests.support.encoded_images import chunk, encoded, picture, rotation
from tests.support.fuzz import fuzz_rounds, mutate

LIMIT = 1_000_000


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize(
    ("kind", "options", "least"),
    [
        ("PNG", {}, 90),
        ("WEBP", {"lossless": True}, 90),
        ("BMP", {}, 90),
        ("TIFF", {}, 90),
        ("TIFF", {"compression": "tiff_lzw"}, 90),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, 90),
        ("TIFF", {"compression": "packbits", "big_tiff": True}, 90),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 40),
        ("JPEG", {"quality": 95}, 40),
        ("JPEG", {"quality": 95, "progressive": True}, 40),
        ("JPEG", {"quality": 95, "subsampling": 0}, 40),
        ("JPEG", {"quality": 95, "optimize": True, "restart_marker_rows": 1}, 40),
    ],
)
def test_images_decode_to_what_was_encoded(kind, options, least):
    data = encoded(picture(), kind, **options)
    expected = np.array(Image.open(io.BytesIO(data))) if kind == "JPEG" else picture()
    assert psnr(decode(data, LIMIT), expected) > least


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")),
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("WEBP", mode) for mode in ("L", "RGB", "RGBA")),
        *(("GIF", mode) for mode in ("1", "L", "P", "RGB")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16")),
        *(("AVIF", mode) for mode in ("L", "RGB", "RGBA")),
    ],
)
def test_every_colour_mode_becomes_rgb(kind, mode):
    source = Image.fromarray(picture())
    if mode == "I;16":
        grey = np.array(source.convert("L")).astype(np.uint16) * 257
        image, expected = Image.fromarray(grey), np.repeat((grey >> 8)[:, :, None], 3, axis=2)
    elif mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image, expected = ImageCms.applyTransform(source, to_lab), picture()
        assert image is not None
    else:
        image = source.convert(mode)
        expected = np.array(image.convert("RGB"))
    decoded = decode(encoded(image, kind), LIMIT)
    assert (decoded.shape, decoded.dtype) == ((60, 90, 3), np.uint8)
    assert psnr(decoded, expected) > (20 if kind == "GIF" and mode == "RGB" else 30)


def test_transparent_pixels_become_white_and_pixels_of_unknown_range_are_bad():
    pixels = np.dstack([np.zeros((10, 10, 3), np.uint8), np.full((10, 10), 255, np.uint8)])
    pixels[:, :5, 3] = 0
    kinds: dict[str, dict[str, Any]] = {"PNG": {}, "TIFF": {}, "AVIF": {"quality": 100}}
    for kind, options in (kinds | {"WEBP": {"lossless": True, "exact": True}}).items():
        decoded = decode(encoded(Image.fromarray(pixels), kind, **options), LIMIT)
        assert (decoded[:, :5] == 255).all()
        assert (decoded[:, 5:] <= (2 if kind == "AVIF" else 0)).all()
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (decode(encoded(palette, "PNG", transparency=0), LIMIT) == 255).all()
    grey = np.array([[0, 300, 65535], [300, 301, 40000]], dtype=np.uint16)
    decoded = decode(encoded(Image.fromarray(grey), "PNG", transparency=300), LIMIT)
    assert (decoded[:, :, 0] == [[0, 255, 255], [255, 1, 156]]).all()
    for mode in ("I", "F"):
        with pytest.raises(BadSample, match="32-bit"):
            decode(encoded(Image.fromarray(picture()).convert(mode), "TIFF"), LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied(kind):
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    for orientation in range(1, 9):
        data = encoded(picture(), kind, exif=rotation(orientation), **options)
        upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        image, size = decode(data, LIMIT), measure(data)
        assert (size.height, size.width, 3) == image.shape == upright.shape
        assert psnr(image, upright) > 40
        assert image.flags.c_contiguous


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_and_too_large_images_are_bad(kind):
    data = encoded(picture(300, 300), kind)
    for fraction in (0.02, 0.3, 0.9):
        with pytest.raises(BadSample) as error:
            decode(data[: int(len(data) * fraction)], LIMIT)
        assert error.value.stage == "image"
        assert error.value.reason
    assert decode(data, 90_000).shape == (300, 300, 3)
    with pytest.raises(BadSample, match="bomb"):
        decode(data, 89_999)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xd8", b"\xff\xd8\xff", b"hello, I am text", b"BM", b"GIF89a", b"II*\0", b"MM\0*\0\0\0\x08", b"RIFF",
        b"RIFF\4\0\0\0WEBP", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x1cftypavif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        encoded(picture(), "PPM"), encoded(picture(), "ICO"), encoded(picture(), "JPEG2000"),
    ],
)  # fmt: skip
def test_non_images_are_bad_to_decoder_and_index(data):
    for judge in (lambda: decode(data, LIMIT), lambda: measure(data)):
        with pytest.raises(BadSample):
            judge()


def test_bombs_are_rejected_from_the_header_and_so_are_images_of_extreme_shape():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0))
    with pytest.raises(BadSample, match="bomb"):
        decode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"never read"), LIMIT)
    for kind in ("PNG", "TIFF", "BMP"):
        for height, width in ((1, 70_000), (70_000, 400), (1, 201), (402, 2)):
            with pytest.raises(BadSample, match="ratio"):
                decode(encoded(Image.new("L", (width, height)), kind), 10**9)
        assert decode(encoded(Image.new("L", (200, 1)), kind), 10**9).shape == (1, 200, 3)


def test_large_images_are_converted_in_bounded_memory():
    """At the default limit of 25 million pixels, one RGBA copy of the image takes 100 MB in Pillow."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peak memory is only available on Linux")
    code = """
import io
from PIL import Image
from pipeline.config.schema import DataConfig
from pipeline.data.contents.images import decode
def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
for mode in ("L", "RGBA"):
    buffer = io.BytesIO()
    Image.new(mode, (5000, 5000)).save(buffer, "PNG", compress_level=1)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    assert decode(buffer.getvalue(), DataConfig().max_pixels).shape == (5000, 5000, 3)
    print((resident("VmHWM") - before) / 1000)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert len(found.stdout.split()) == 2
    assert max(map(float, found.stdout.split())) < 250


DAMAGED_EXIF = [
    b"", b"Exif\0\0", b"Exif\0\0hello", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\0\1", b"garbage"
]  # fmt: skip
LONG = zlib.compress(bytes(3 << 20))
ODD_CHUNKS = {
    "long tEXt": chunk(b"tEXt", b"Comment\0" + b"a" * (3 << 20)),
    "long zTXt": chunk(b"zTXt", b"Comment\0\0" + LONG),
    "long iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG),
    "long ICC": chunk(b"iCCP", b"profile\0\0" + LONG),
    "broken zTXt": chunk(b"zTXt", b"Comment\0\0nothing"),
    "zTXt of an unknown method": chunk(b"zTXt", b"Comment\0\7" + LONG),
    "broken ICC": chunk(b"iCCP", b"profile"),
    "wrong checksum of text": chunk(b"tEXt", b"Comment\0abc", is_intact=False),
    "wrong checksum of gamma": chunk(b"gAMA", b"\0\0\xb1\x8f", is_intact=False),
    "wrong checksum of EXIF": chunk(b"eXIf", b"II*\0", is_intact=False),
    "wrong checksum of an unknown chunk": chunk(b"xyZz", b"abc", is_intact=False),
    "short pHYs": chunk(b"pHYs", b"\0"),
    "short cHRM": chunk(b"cHRM", b"\0"),
    "short gAMA": chunk(b"gAMA", b""),
    "short sRGB": chunk(b"sRGB", b""),
    "broken acTL": chunk(b"acTL", b""),
    "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  12\nnot hexadecimal")),
    **{f"EXIF {each!r}": chunk(b"eXIf", each) for each in DAMAGED_EXIF},
}


@pytest.mark.parametrize("oddity", ODD_CHUNKS)
def test_pngs_with_damaged_metadata_are_decoded(oddity):
    data = encoded(picture(), "PNG")
    for place in (33, -12):  # behind IHDR, before IEND
        odd = data[:place] + ODD_CHUNKS[oddity] + data[place:]
        assert (decode(odd, LIMIT) == picture()).all()
        assert measure(odd) == ImageSize(60, 90)
        at = odd.index(b"IDAT") + 4 + len(data) // 2
        with pytest.raises(BadSample):
            decode(odd[:at] + b"damaged" + odd[at + 7 :], LIMIT)


def test_repaired_png_keeps_transparency_and_orientation():
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    data = encoded(Image.fromarray(grey), "PNG", transparency=7, exif=rotation(6))
    odd = data[:33] + ODD_CHUNKS["wrong checksum of text"] + data[33:]
    assert (decode(odd, LIMIT) == decode(data, LIMIT)).all()
    assert decode(odd, LIMIT).shape == (10, 6, 3)
    assert measure(odd) == measure(data) == ImageSize(10, 6)


@pytest.mark.parametrize("exif", DAMAGED_EXIF)
def test_webps_with_damaged_metadata_are_decoded(exif):
    alpha = np.dstack([picture(), np.full((60, 90), 200, np.uint8)])
    damaged = b"EXIF" + struct.pack("<I", len(exif)) + exif + bytes(len(exif) % 2)
    for image, lossless in ((picture(), False), (picture(), True), (alpha, False), (alpha, True)):
        plain = encoded(image, "WEBP", lossless=lossless, exact=True)
        whole = encoded(image, "WEBP", lossless=lossless, exact=True, exif=b"Exif\0\0II*\0", icc_profile=b"none")
        odd = whole.replace(b"EXIF\x0a\0\0\0Exif\0\0II*\0", damaged)
        odd = odd[:4] + struct.pack("<I", len(odd) - 8) + odd[8:]
        assert measure(odd) == ImageSize(60, 90)
        for data in (odd, odd[:-3]):  # whole, and cut inside of the last chunk, which is metadata
            assert (decode(data, LIMIT) == decode(plain, LIMIT)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_trailing_bytes_are_ignored(kind):
    data = encoded(picture(), kind)
    for behind in (b"A" * 100, b"\0\0\0\1ABCDEFGH", b"\0\0\0\0IDAT\0\0\0\0", bytes(2000)):
        assert (decode(data + behind, LIMIT) == decode(data, LIMIT)).all()
        assert measure(data + behind) == measure(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_animations_give_their_first_frame_and_are_marked(kind):
    frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (40, 120, 200)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode(data, LIMIT).astype(int) - 40).max() <= 3
    assert measure(data) == ImageSize(20, 30, is_animated=True)
    assert not measure(encoded(frames[0], kind)).is_animated


@pytest.mark.parametrize("raised", [KeyError, SyntaxError, struct.error, RuntimeError, OverflowError, RecursionError])
def test_every_exception_of_a_decoder_is_a_bad_sample(monkeypatch, raised):
    monkeypatch.setattr("simplejpeg.decode_jpeg", mock.Mock(side_effect=raised("x")))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", mock.Mock(side_effect=raised("x")))
    for kind in FORMATS.keys() - {"WEBP", "AVIF"}:  # whose plugins load the pixels themselves
        with pytest.raises(BadSample) as error:
            decode(encoded(picture(), kind), LIMIT)
        assert error.value.stage == "image"


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_images_raise_only_bad_samples(kind):
    rng, small = random.Random(kind), Image.fromarray(picture(24, 40))
    frames = {"save_all": True, "append_images": [small] * 2} if kind in ("GIF", "TIFF") else {}
    exif = {} if kind in ("BMP", "GIF") else {"exif": rotation(6)}
    whole = [encoded(small, kind, **exif), encoded(small.convert("L"), kind), encoded(small, kind, **frames)]
    decoded = 0
    for _ in range(fuzz_rounds(150)):
        data = mutate(rng.choice(whole), rng)
        if kind == "PNG" and rng.random() < 0.7:
            data = with_right_checksums(data)
        try:
            size = decode(data, LIMIT).shape[:2]
        except BadSample:
            with suppress(BadSample):
                measure(data)
        else:
            measured = measure(data)
            assert (measured.height, measured.width) == size
            decoded += 1
    assert decoded


def with_right_checksums(png: bytes) -> bytes:
    at, whole = 8, png[:8]
    while at + 12 <= len(png):
        end = at + 12 + struct.unpack_from(">I", png, at)[0]
        if end > len(png):
            break
        whole, at = whole + chunk(png[at + 4 : at + 8], png[at + 8 : end - 4]), end
    return whole + png[at:]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [(640, 480, 384), (1200, 300, 224), (300, 2000, 224), (480, 640, KeepAspectRatio(384, 639, 32)), (40, 30, 64)],
)
def test_resizing_equals_pillows_rows_before_columns(height, width, shape, interpolation):
    """Results agree within 2 grey levels for any shape and sharp edges, in the order of Pillow up to version 12."""
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    for image in (noise, picture(height, width)):
        resized = resize(image, shape, interpolation)
        rows = Image.fromarray(image).resize((resized.shape[1], height), kernel)
        expected = np.array(rows.resize((resized.shape[1], resized.shape[0]), kernel))
        assert np.abs(resized.astype(int) - expected).max() <= 2
        assert resized.dtype == np.uint8
        assert resized.flags.c_contiguous


def test_model_reads_images_and_views_of_them_by_its_own_interpolation():
    image, view = picture(90, 70), picture(200, 300)[20:150, 31:222]
    for interpolation in ("bicubic", "bilinear"):
        model = ViTConfig(image_size=32, interpolation=interpolation)
        assert (images.resize_for(image, model) == resize(image, 32, interpolation)).all()
        assert (resize(view, 64, interpolation) == resize(view.copy(), 64, interpolation)).all()
    assert (resize(image, 32, "bicubic") != resize(image, 32, "bilinear")).any()


def test_images_of_any_shape_are_cropped_by_the_key_alone_with_scale_and_ratio():
    for height, width, key in itertools.product((300, 400, 224), (300, 400, 224), range(200)):
        top, left, rows, columns = images.draw_crop(height, width, 32, (0.5, 1.0), CounterRandom(hash64(key)))
        assert 0 <= top <= height - rows
        assert 0 <= left <= width - columns
        assert images.RATIO[0] * 0.98 <= columns / rows <= images.RATIO[1] * 1.02
        assert 0.49 <= rows * columns / (height * width) <= 1.0

    def crop(image: np.ndarray, key: int) -> np.ndarray:
        plain = AugmentConfig(crop_scale=(0.2, 1.0), flip=False, num_ops=0)
        return augment(image, plain, 32, CounterRandom(key), allow_flip=False)

    for height, width in ((1, 1), (1, 500), (500, 1), (7, 3), (20, 2000)):
        assert all(crop(picture(height, width), key).shape == (32, 32, 3) for key in range(20))
    assert (crop(picture(), 5) == crop(picture(), 5)).all()
    assert (crop(picture(), 5) != crop(picture(), 6)).any()
