"""Image decoding in every format and mode, refusal of bad images, crops and resizing.

JPEGs of cameras and editors are decoded if only metadata is odd, and refused if pixels are damaged.
"""

import io
import itertools
import os
import random
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipeline.config.schema import AugmentConfig, DualEncoderConfig
from pipeline.data.contents import images, jpeg
from pipeline.data.contents.images import (
    FORMATS,
    ImageSize,
    KeepAspectRatio,
    _png_chunks,
    decode,
    measure,
    resize,
    resize_for,
)
from pipeline.data.examples.augment import augment
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import CounterRandom, hash64
from tests.support.encoded_images import chunk, encoded, picture, rotation, sampled_jpeg, segment, with_segments
from tests.support.fuzz import fuzz_rounds, mutate

LIMIT = 1_000_000


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2)))


def pillows(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def assert_bad(data: bytes, reason: str | None = None, limit: int = LIMIT) -> None:
    with pytest.raises(BadSample, match=reason) as error:
        decode(data, limit)
    assert (error.value.stage, bool(error.value.reason)) == ("image", True)


def test_images_decode_to_what_was_encoded():
    jpegs = {}, {"progressive": True}, {"subsampling": 0}, {"optimize": True, "restart_marker_rows": 1}
    for kind, options in (
        *(("TIFF", {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate")),
        *(("TIFF", {"compression": "packbits", "big_tiff": True}), ("PNG", {}), ("BMP", {})),
        *(("WEBP", {"lossless": True}), ("AVIF", {"quality": 100, "subsampling": "4:4:4"})),
        *(("JPEG", {"quality": 95, **more}) for more in jpegs),
    ):
        data = encoded(picture(), kind, **options)
        expected = pillows(data) if kind == "JPEG" else picture()
        assert psnr(decode(data, LIMIT), expected) > (40 if kind in ("JPEG", "AVIF") else 90), (kind, options)


MODES = {
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"), "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("L", "RGB", "RGBA"), "GIF": ("1", "L", "P", "RGB"), "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"), "AVIF": ("L", "RGB", "RGBA"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_colour_mode_becomes_rgb(kind, mode):
    source = Image.fromarray(picture())
    if mode == "I;16":
        grey = np.array(source.convert("L")).astype(np.uint16) * 257
        image, expected = Image.fromarray(grey), np.repeat((grey >> 8)[:, :, None], 3, axis=2)
    elif mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image, expected = ImageCms.applyTransform(source, to_lab), picture()
    else:
        image = source.convert(mode)
        expected = np.array(image.convert("RGB"))
    decoded = decode(encoded(image, kind), LIMIT)
    assert (decoded.shape, decoded.dtype) == ((60, 90, 3), np.uint8)
    assert psnr(decoded, expected) > (20 if (kind, mode) == ("GIF", "RGB") else 30)


def test_transparent_pixels_become_white_and_pixels_of_unknown_range_are_bad():
    pixels = np.dstack([np.zeros((10, 10, 3), np.uint8), np.full((10, 10), 255, np.uint8)])
    pixels[:, :5, 3] = 0
    options_of = {"PNG": {}, "TIFF": {}, "AVIF": {"quality": 100}, "WEBP": {"lossless": True, "exact": True}}
    for kind, options in options_of.items():
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
        assert_bad(encoded(Image.fromarray(picture()).convert(mode), "TIFF"), "32-bit")
    grey = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10))
    data = encoded(grey, "PNG", transparency=7, exif=rotation(6))
    odd = data[:33] + WRONG_CHECKSUM + data[33:]  # a repaired PNG keeps transparency and orientation
    assert np.array_equal(decode(odd, LIMIT), decode(data, LIMIT))
    assert measure(odd) == measure(data) == ImageSize(*decode(odd, LIMIT).shape[:2]) == ImageSize(10, 6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied(kind):
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    for orientation in range(1, 9):
        data = encoded(picture(), kind, exif=rotation(orientation), **options)
        upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        image, size = decode(data, LIMIT), measure(data)
        assert (size.height, size.width, 3) == image.shape == upright.shape
        assert (psnr(image, upright) > 40, image.flags.c_contiguous) == (True, True)
        if kind == "JPEG":  # odd JPEGs are rotated too
            payload = segment(0xE1, b"Exif\0\0" + rotation(orientation).tobytes().removeprefix(b"Exif\0\0"))
            for plain in (PHOTO, sampled_jpeg("4x2 1x1 1x1")):
                odd = with_segments(plain, b"junk", payload)
                sides = (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)
                assert (decode(odd, LIMIT).shape, measure(odd)) == ((*sides, 3), ImageSize(*sides))


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_and_too_large_images_are_bad_and_trailing_bytes_ignored(kind):
    data = encoded(picture(), kind)
    for behind in (b"A" * 100, b"\0\0\0\1ABCDEFGH", b"\0\0\0\0IDAT\0\0\0\0", bytes(2000)):
        if kind not in ("TIFF", "AVIF"):
            assert (decode(data + behind, LIMIT) == decode(data, LIMIT)).all()
            assert measure(data + behind) == measure(data)
    data = encoded(picture(300, 300), kind)
    for fraction in (0.02, 0.3, 0.9):
        assert_bad(data[: int(len(data) * fraction)])
    assert decode(data, 90_000).shape == (300, 300, 3)
    assert_bad(data, "bomb", limit=89_999)


def test_non_images_are_bad_to_decoder_and_index_and_bombs_and_extreme_shapes_by_the_header():
    for data in (
        b"", b"\xff\xd8", b"\xff\xd8\xff", b"hello, I am text", b"BM", b"GIF89a", b"II*\0", b"MM\0*\0\0\0\x08", b"RIFF",
        b"RIFF\4\0\0\0WEBP", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x1cftypavif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        encoded(picture(), "PPM"), encoded(picture(), "ICO"), encoded(picture(), "JPEG2000"),
    ):  # fmt: skip
        assert_bad(data)
        with pytest.raises(BadSample):
            measure(data)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0))
    assert_bad(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"never read"), "bomb")
    for kind in ("PNG", "TIFF", "BMP"):
        for height, width in ((1, 70_000), (70_000, 400), (1, 201), (402, 2)):
            assert_bad(encoded(Image.new("L", (width, height)), kind), "ratio", limit=10**9)
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
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert len(process.stdout.split()) == 2
    assert max(map(float, process.stdout.split())) < 250


DAMAGED_EXIF = [b"", b"Exif\0\0", b"Exif\0\0hi", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\0\1", b"garbage"]
LONG = zlib.compress(bytes(3 << 20))
RAW_PROFILE = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  12\nnot hexadecimal")
WRONG_CHECKSUM = chunk(b"tEXt", b"Comment\0abc", is_intact=False)
ODD_CHUNKS = {
    "long tEXt": chunk(b"tEXt", b"Comment\0" + b"a" * (3 << 20)), "long zTXt": chunk(b"zTXt", b"Comment\0\0" + LONG),
    "long iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG), "long ICC": chunk(b"iCCP", b"profile\0\0" + LONG),
    "broken zTXt": chunk(b"zTXt", b"Comment\0\0nothing"), "broken ICC": chunk(b"iCCP", b"profile"),
    "zTXt of an unknown method": chunk(b"zTXt", b"Comment\0\7" + LONG), "raw profile": chunk(b"zTXt", RAW_PROFILE),
    "wrong checksum of text": WRONG_CHECKSUM,
    "wrong checksum of gamma": chunk(b"gAMA", b"\0\0\xb1\x8f", is_intact=False),
    "wrong checksum of EXIF": chunk(b"eXIf", b"II*\0", is_intact=False),
    "wrong checksum of an unknown chunk": chunk(b"xyZz", b"abc", is_intact=False),
    **{f"short {name}": chunk(name.encode(), b"\0") for name in ("pHYs", "cHRM")},
    **{f"empty {name}": chunk(name.encode(), b"") for name in ("gAMA", "sRGB", "acTL")},
    **{f"EXIF {exif!r}": chunk(b"eXIf", exif) for exif in DAMAGED_EXIF},
}  # fmt: skip


@pytest.mark.parametrize("oddity", ODD_CHUNKS)
def test_pngs_with_damaged_metadata_are_decoded(oddity):
    data = encoded(picture(), "PNG")
    for place in (33, -12):  # behind IHDR, before IEND
        odd = data[:place] + ODD_CHUNKS[oddity] + data[place:]
        assert (decode(odd, LIMIT) == picture()).all()
        assert measure(odd) == ImageSize(60, 90)
        at = odd.index(b"IDAT") + 4 + len(data) // 2
        assert_bad(odd[:at] + b"damaged" + odd[at + 7 :])


@pytest.mark.parametrize("exif", DAMAGED_EXIF)
def test_webps_with_damaged_metadata_are_decoded(exif):
    alpha = np.dstack([picture(), np.full((60, 90), 200, np.uint8)])
    damaged = b"EXIF" + struct.pack("<I", len(exif)) + exif + bytes(len(exif) % 2)
    for image, lossless in itertools.product((picture(), alpha), (False, True)):
        plain = encoded(image, "WEBP", lossless=lossless, exact=True)
        whole = encoded(image, "WEBP", lossless=lossless, exact=True, exif=b"Exif\0\0II*\0", icc_profile=b"none")
        odd = whole.replace(b"EXIF\x0a\0\0\0Exif\0\0II*\0", damaged)
        odd = odd[:4] + struct.pack("<I", len(odd) - 8) + odd[8:]
        assert measure(odd) == ImageSize(60, 90)
        for data in (odd, odd[:-3]):  # whole, and cut inside of the last chunk, which is metadata
            assert (decode(data, LIMIT) == decode(plain, LIMIT)).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_animations_give_their_first_frame_and_are_marked(kind):
    frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (40, 120, 200)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode(data, LIMIT).astype(int) - 40).max() <= 3
    assert measure(data) == ImageSize(20, 30, is_animated=True)
    assert not measure(encoded(frames[0], kind)).is_animated


@pytest.mark.parametrize("raised", [KeyError, SyntaxError, struct.error, RuntimeError, OverflowError, RecursionError])
def test_every_exception_of_a_decoder_is_a_bad_sample(monkeypatch, raised):
    for decoder in ("simplejpeg.decode_jpeg", "PIL.ImageFile.ImageFile.load"):
        monkeypatch.setattr(decoder, mock.Mock(side_effect=raised("x")))
    for kind in FORMATS.keys() - {"WEBP", "AVIF"}:  # whose plugins load the pixels themselves
        assert_bad(encoded(picture(), kind))


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_images_raise_only_bad_samples(kind):
    rng, small, decoded = random.Random(kind), Image.fromarray(picture(24, 40)), 0
    frames = {"save_all": True, "append_images": [small] * 2} if kind in ("GIF", "TIFF") else {}
    exif = {} if kind in ("BMP", "GIF") else {"exif": rotation(6)}
    whole = [encoded(small, kind, **exif), encoded(small.convert("L"), kind), encoded(small, kind, **frames)]
    for _ in range(fuzz_rounds(150)):
        data = mutate(rng.choice(whole), rng)
        if kind == "PNG" and rng.random() < 0.7:  # most damage would end at a checksum: make them right again
            corrected = b""  # but a cut chunk stays cut
            for name, part, _ in _png_chunks(data):
                is_whole = len(part) == 12 + int.from_bytes(part[:4], "big")
                corrected += chunk(name, part[8:-4]) if is_whole and name != b"IEND" else part
            data = data[:8] + corrected + data[8 + len(corrected) :]
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


HEIGHT, WIDTH = 120, 164
PHOTO = encoded(picture(HEIGHT, WIDTH), "JPEG")
STRICT = (  # chroma samplings that the strict decoder knows
    "1x1 1x1 1x1", "2x2 1x1 1x1", "1x4 1x1 1x1", "4x1 1x1 1x1", "3x1 3x1 3x1", "2x2 1x2 1x2", "1x1", "2x2",
    "1x1 1x1 1x1 1x1", "2x2 1x1 1x1 2x2",
)  # fmt: skip
LENIENT = (  # those that only Pillow knows
    "4x2 1x1 1x1", "2x4 1x1 1x1", "4x1 2x1 2x1", "4x1 2x1 1x1", "1x1 2x2 2x2", "3x1 1x1 1x1", "1x3 1x1 1x1",
    "2x2 2x1 1x2", "2x2 1x1 2x2", "1x1 1x1 2x1", "2x1 1x2 1x1", "2x1 1x1 1x1 1x1",
)  # fmt: skip


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", STRICT + LENIENT)
def test_every_chroma_sampling_decodes_as_in_pillow_unless_its_pixels_are_damaged(sampling, progressive):
    data = sampled_jpeg(sampling, progressive)
    assert (decode(data, LIMIT) == pillows(data)).all()
    assert measure(data) == ImageSize(HEIGHT, WIDTH)
    begin = data.index(b"\xff\xda") + 20
    cuts = [data[: int(begin + fraction * (len(data) - 2 - begin))] for fraction in (0.0, 0.3, 0.7, 0.99)]
    damaged = list(cuts)
    if sampling in STRICT:  # of the others, cut files alone are detected
        at = (begin + len(data)) // 2
        damaged += [*(cut + jpeg.EOI for cut in cuts), data[:at] + b"\xff\xd3\x77" + data[at + 3 :]]
        assert_bad(data[:-2] + 32 * b"\x12\x34" + data[-2:], "extraneous")
    for cut in damaged:
        assert_bad(cut)


ICC = b"ICC_PROFILE\0"
SEGMENTS = {  # marker and payload of the segments that follow SOI
    "ICC out of order": [(0xE2, ICC + b"\2\2a"), (0xE2, ICC + b"\1\2b")], "ICC of no chunks": [(0xE2, ICC + b"\0\0")],
    "ICC chunk missing": [(0xE2, ICC + b"\3\7abc")], "ICC twice": 2 * [(0xE2, ICC + b"\1\1abc")],
    "APP14 cut": [(0xEE, b"Adobe\0\x64")], "APP14 without content": [(0xEE, b"")],
    "unknown Adobe transform": [(0xEE, b"Adobe\0\x64\0\0\0\0\x09")], "JFIF cut": [(0xE0, b"JFIF\0\1")],
    "JFIF of another version": [(0xE0, b"JFIF\0\x07\x07\0\0\1\0\1\0\0")], "EXIF cut": [(0xE1, b"Exif\0\0II")],
    "EXIF of nothing": [(0xE1, b"Exif\0\0")], "EXIF that is no TIFF": [(0xE1, b"Exif\0\0hello there")],
    "EXIF entries cut": [(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")],
    "EXIF offset outside": [(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")],
    "MPF": [(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")], "comment that is no text": [(0xFE, b"\xff\xfe\xff\xff\xd8")],
    "Photoshop": [(0xED, b"Photoshop 3.0\08BIM\x04\x04\0\0\xff\xff\xff\xff")],
}  # fmt: skip
INSERTED = {  # bytes, and the marker before which they are
    "junk between segments": (b"\x00\x12\x34", 0xDB), "stuffed junk": (b"\xff\x00\xff\x00", 0xC4),
    "junk behind SOI": (b"\0\0", None), "fill bytes": (b"\xff\xff\xff", 0xDB),
    "ICC behind SOF": (segment(0xE2, ICC + b"\2\1abc"), 0xDA),
    **{name: (b"".join(segment(*part) for part in parts), None) for name, parts in SEGMENTS.items()},
}  # fmt: skip
REPLACED = {"Se=0 (Samsung)": b"\x00\x00\x00", "Se=63, Al=1": b"\x00\x3f\x01"}  # of the scan's parameters 0, 63, 0


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("oddity", [*INSERTED, *REPLACED, "data behind the end"])
def test_jpegs_with_harmless_oddities_are_decoded(oddity, mode):
    data = encoded(Image.fromarray(picture(HEIGHT, WIDTH)).convert(mode), "JPEG", quality=90)
    odd = data.replace(b"\x00\x3f\x00", REPLACED.get(oddity, b"\x00\x3f\x00"), 1)
    if oddity in INSERTED:
        odd = with_segments(data, INSERTED[oddity][0], before=INSERTED[oddity][1])
    odd += b"anything \xff\xd8\xff" if oddity == "data behind the end" else b""
    assert (odd != data, measure(odd)) == (True, ImageSize(HEIGHT, WIDTH))
    assert (decode(odd, LIMIT) == pillows(data)).all()
    at = (odd.index(b"\xff\xda") + len(odd)) // 2
    for cut in (odd[:at] + b"\xff\xd3\x77" + odd[at + 3 :], odd[:at]):
        assert_bad(cut)


def test_jpegs_of_hundreds_of_scans_of_12_bits_or_without_pixels_are_rejected():
    progressive = encoded(Image.fromarray(picture(HEIGHT, WIDTH)).convert("L"), "JPEG", progressive=True)
    for data, has_one_scan in ((PHOTO, True), (progressive, False)):  # decoders read only one of all components
        scan = next(part for part in jpeg.segments(data) if part.marker == 0xDA)
        many = data[: scan.stop] + jpeg.MAX_SCANS * data[scan.start - 4 : scan.stop] + data[scan.stop :]
        assert jpeg.read_header(many).has_one_scan is has_one_scan
        assert decode(data, LIMIT).shape == (HEIGHT, WIDTH, 3)
        assert_bad(many, "more than 100 scans")
    (scan,) = [part for part in jpeg.segments(PHOTO) if part.marker == 0xDA]
    of_one_component = PHOTO[: scan.start - 2] + b"\0\x08\x01\x01\0\0\x3f\0" + PHOTO[scan.end :]
    assert [jpeg.read_header(data).has_one_scan for data in (of_one_component, PHOTO[: scan.start + 1])] == [False] * 2
    metadata = 10 * [segment(0xE1, b"Exif\0\0" + 50 * b"\xff\xda\0\x08")]  # contains no scans
    assert decode(with_segments(PHOTO, *metadata), LIMIT).shape == (HEIGHT, WIDTH, 3)
    frame = PHOTO.index(b"\xff\xc0") + 4
    for at, value in ((frame, b"\x0c"), (frame + 1, b"\0\0"), (frame + 3, b"\0\0")):  # 12 bits, and no pixels
        assert_bad(PHOTO[:at] + value + PHOTO[at + len(value) :])


SHAPES = ((640, 480, 384), (1200, 300, 224), (300, 2000, 224), (480, 640, KeepAspectRatio(384, 639, 32)), (40, 30, 64))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width", "shape"), SHAPES)
def test_resizing_equals_pillows_rows_before_columns(height, width, shape, interpolation):
    """Results agree within 2 grey levels for any shape and sharp edges, in the order of Pillow up to version 12."""
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    for image in (noise, picture(height, width)):
        resized = resize(image, shape, interpolation)
        rows = Image.fromarray(image).resize((resized.shape[1], height), kernel)
        expected = np.array(rows.resize((resized.shape[1], resized.shape[0]), kernel))
        assert np.abs(resized.astype(int) - expected).max() <= 2
        assert (resized.dtype, resized.flags.c_contiguous) == (np.uint8, True)
        other = resize(image, shape, "bilinear" if interpolation == "bicubic" else "bicubic")
        assert (resized != other).any()
        view = image[3:-2, 5:-1]
        assert (resize(view, shape, interpolation) == resize(view.copy(), shape, interpolation)).all()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 299), (224, 224), (223, 900), (31, 17), (2000, 224)])
def test_centre_crops_are_hugging_faces_clip_preprocessing_to_one_grey_level(height, width):
    pixels = picture(height, width)
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    theirs = processor(Image.fromarray(pixels))["pixel_values"][0].transpose(1, 2, 0)
    ours = resize_for(pixels, DualEncoderConfig())
    assert ours.shape == theirs.shape == (224, 224, 3)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_images_of_any_shape_are_cropped_by_the_key_alone_with_scale_and_ratio():
    for height, width, key in itertools.product((300, 400, 224), (300, 400, 224), range(200)):
        top, left, rows, columns = images.draw_crop(height, width, 32, (0.5, 1.0), CounterRandom(hash64(key)))
        assert 0 <= top <= top + rows <= height
        assert 0 <= left <= left + columns <= width
        assert images.RATIO[0] * 0.98 <= columns / rows <= images.RATIO[1] * 1.02
        assert 0.49 <= rows * columns / (height * width) <= 1.0

    plain = AugmentConfig(crop_scale=(0.2, 1.0), flip=False, num_ops=0)
    for height, width in ((1, 1), (1, 500), (500, 1), (7, 3), (20, 2000)):
        for key in range(20):
            assert augment(picture(height, width), plain, 32, CounterRandom(key), False).shape == (32, 32, 3)
    one, same, other = (augment(picture(), plain, 32, CounterRandom(key), False).tobytes() for key in (5, 5, 6))
    assert one == same != other
