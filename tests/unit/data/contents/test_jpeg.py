"""JPEGs of cameras and editors: decoded if only metadata is odd, refused if pixels are damaged.

Most are written by `sampled_jpeg`, which supports any chroma sampling; oddities are inserted between its segments.
"""

from __future__ import annotations

import functools
import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.data.contents import jpeg
from pipeline.data.contents.images import decode, measure
from pipeline.data.quarantine import BadSample

LIMIT = 1_000_000
HEIGHT, WIDTH = 120, 164
Factors = tuple[tuple[int, int], ...]
SAMPLINGS = (
    "1x1 1x1 1x1", "2x2 1x1 1x1", "1x4 1x1 1x1", "4x1 1x1 1x1", "4x2 1x1 1x1", "2x4 1x1 1x1", "4x1 2x1 2x1",
    "4x1 2x1 1x1", "1x1 2x2 2x2", "3x1 1x1 1x1", "3x1 3x1 3x1", "1x3 1x1 1x1", "2x2 2x1 1x2", "2x2 1x1 2x2",
    "1x1 1x1 2x1", "2x1 1x2 1x1", "2x2 1x2 1x2", "1x1", "2x2", "1x1 1x1 1x1 1x1", "2x2 1x1 1x1 2x2", "2x1 1x1 1x1 1x1",
)  # fmt: skip
ONLY_PILLOW = SAMPLINGS[4:10] + SAMPLINGS[11:16] + SAMPLINGS[-1:]


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 29) * np.cos(y / 27)], axis=2)
    return image.astype(np.uint8)


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def factors_of(sampling: str) -> Factors:
    return tuple((int(each[0]), int(each[2])) for each in sampling.split())


@functools.cache
def sampled_jpeg(factors: Factors, progressive: bool = False, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """Return a JPEG of DC coefficients in any sampling: `factors` of 1 (grey), 3 (YCbCr) or 4 (CMYK) components."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")  # for its tables
    standard = buffer.getvalue()
    found = [(each.marker, standard[each.start : each.end]) for each in jpeg.segments(standard)]
    tables = b"".join(segment(marker, payload) for marker, payload in found if marker in (0xC4, 0xDB))
    quantizers = {payload[0]: payload[1] for marker, payload in found if marker == 0xDB}
    codes = {}
    for payload in (payload for marker, payload in found if marker == 0xC4):
        code = at = 0
        for length, count in enumerate(payload[1:17], 1):
            for symbol in payload[17 + at : 17 + at + count]:
                codes[payload[0], symbol] = format(code, f"0{length}b")
                code += 1
            at, code = at + count, code << 1

    across, down = max(h for h, _ in factors), max(v for _, v in factors)
    columns, rows = -(-width // (8 * across)), -(-height // (8 * down))
    image = Image.fromarray(picture(height, width))
    planes = {1: "L", 3: "YCbCr", 4: "CMYK"}[len(factors)]
    levels = []
    for number, (plane, (h, v)) in enumerate(zip(image.convert(planes).split(), factors, strict=True)):
        h, v = (1, 1) if len(factors) == 1 else (h, v)
        if len(factors) == 1:
            columns, rows = -(-width // 8), -(-height // 8)
        small = np.asarray(plane.resize((columns * h, rows * v), Image.Resampling.BOX)).astype(float)
        levels.append(np.round((small - 128) * 8 / quantizers[min(number, 1)]).astype(int))
    bits, last = [], [0] * len(factors)
    for row in range(rows):
        for column in range(columns):
            for number, (h, v) in enumerate(factors if len(factors) > 1 else ((1, 1),)):
                for block in range(h * v):
                    level = int(levels[number][row * v + block // h, column * h + block % h])
                    change, last[number] = level - last[number], level
                    size = abs(change).bit_length()
                    bits.append(codes[min(number, 1), size])
                    if size:
                        bits.append(format(change if change > 0 else change + (1 << size) - 1, f"0{size}b"))
                    if not progressive:
                        bits.append(codes[0x10 + min(number, 1), 0])
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    entropy = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = struct.pack(">BHHB", 8, height, width, len(factors)) + b"".join(
        bytes([number + 1, h << 4 | v, min(number, 1)]) for number, (h, v) in enumerate(factors)
    )
    scan = bytes([len(factors)]) + b"".join(bytes([number + 1, min(number, 1) * 17]) for number in range(len(factors)))
    scan += b"\0\0\0" if progressive else b"\0\x3f\0"
    return jpeg.SOI + tables + segment(0xC2 if progressive else 0xC0, frame) + segment(0xDA, scan) + entropy + jpeg.EOI


def pillows(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def saved(image: np.ndarray | Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_segments(data: bytes, *added: bytes, before: int | None = None) -> bytes:
    """Return the JPEG with bytes inserted after its SOI, or before its first segment of a marker."""
    at = 2 if before is None else data.index(bytes([0xFF, before]))
    return data[:at] + b"".join(added) + data[at:]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_chroma_sampling_decodes_as_in_pillow(sampling, progressive):
    data = sampled_jpeg(factors_of(sampling), progressive)
    found = decode(data, LIMIT)
    assert (found == pillows(data)).all()
    if sampling.count("x") < 4:
        assert np.abs(found.astype(int) - picture() if "x1 " in sampling else 0).mean() < 25
    assert (measure(data).height, measure(data).width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_corrupt_pixels_are_bad_in_every_chroma_sampling(sampling, progressive):
    data = sampled_jpeg(factors_of(sampling), progressive)
    begin = data.index(b"\xff\xda") + 20
    cuts = [data[: int(begin + share * (len(data) - 2 - begin))] for share in (0.0, 0.3, 0.7, 0.99)]
    if sampling in ONLY_PILLOW:
        for cut in cuts:
            with pytest.raises(BadSample):
                decode(cut, LIMIT)
        return
    at = (begin + len(data)) // 2
    for damaged in (*cuts, *(cut + jpeg.EOI for cut in cuts), data[:at] + b"\xff\xd3\x77" + data[at + 3 :]):
        with pytest.raises(BadSample):
            decode(damaged, LIMIT)
    with pytest.raises(BadSample, match="extraneous"):
        decode(data[:-2] + 32 * b"\x12\x34" + data[-2:], LIMIT)


EXIF_OFFSET = b"Exif\0\0II*\0\x08\0\0\0"
ICC = b"ICC_PROFILE\0"
ODD = {
    "junk between segments": lambda data: with_segments(data, b"\x00\x12\x34", before=0xDB),
    "stuffed junk": lambda data: with_segments(data, b"\xff\x00\xff\x00", before=0xC4),
    "junk behind SOI": lambda data: with_segments(data, b"\0\0"),
    "fill bytes": lambda data: with_segments(data, b"\xff\xff\xff", before=0xDB),
    "ICC out of order": lambda data: with_segments(data, *(segment(0xE2, ICC + each) for each in (b"\2\2a", b"\1\2b"))),
    "ICC of no chunks": lambda data: with_segments(data, segment(0xE2, ICC + b"\0\0")),
    "ICC chunk missing": lambda data: with_segments(data, segment(0xE2, ICC + b"\3\7abc")),
    "ICC twice": lambda data: with_segments(data, *2 * [segment(0xE2, ICC + b"\1\1abc")]),
    "ICC behind SOF": lambda data: with_segments(data, segment(0xE2, ICC + b"\2\1abc"), before=0xDA),
    "APP14 cut": lambda data: with_segments(data, segment(0xEE, b"Adobe\0\x64")),
    "APP14 without content": lambda data: with_segments(data, segment(0xEE, b"")),
    "unknown Adobe transform": lambda data: with_segments(data, segment(0xEE, b"Adobe\0\x64\0\0\0\0\x09")),
    "JFIF of another version": lambda data: with_segments(data, segment(0xE0, b"JFIF\0\x07\x07\0\0\1\0\1\0\0")),
    "JFIF cut": lambda data: with_segments(data, segment(0xE0, b"JFIF\0\1")),
    "Se=0 (Samsung)": lambda data: data.replace(b"\x00\x3f\x00", b"\x00\x00\x00", 1),
    "Se=63, Al=1": lambda data: data.replace(b"\x00\x3f\x00", b"\x00\x3f\x01", 1),
    "EXIF cut": lambda data: with_segments(data, segment(0xE1, b"Exif\0\0II")),
    "EXIF of nothing": lambda data: with_segments(data, segment(0xE1, b"Exif\0\0")),
    "EXIF that is no TIFF": lambda data: with_segments(data, segment(0xE1, b"Exif\0\0hello there")),
    "EXIF entries cut": lambda data: with_segments(data, segment(0xE1, EXIF_OFFSET + b"\xff\xff\x12\x01\x03\0")),
    "EXIF offset outside": lambda data: with_segments(data, segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "MPF": lambda data: with_segments(data, segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")),
    "Photoshop": lambda data: with_segments(data, segment(0xED, b"Photoshop 3.0\08BIM\x04\x04\0\0\xff\xff\xff\xff")),
    "comment that is no text": lambda data: with_segments(data, segment(0xFE, b"\xff\xfe\xff\xff\xd8")),
    "data behind the end": lambda data: data + b"anything \xff\xd8\xff",
}  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("oddity", ODD)
def test_jpegs_with_harmless_oddities_are_decoded(oddity, mode):
    data = saved(Image.fromarray(picture()).convert(mode), quality=90)
    odd = ODD[oddity](data)
    assert odd != data
    found = decode(odd, LIMIT)
    assert (found == pillows(data)).all()
    assert (measure(odd).height, measure(odd).width) == (HEIGHT, WIDTH)
    at = (odd.index(b"\xff\xda") + len(odd)) // 2
    for damaged in (odd[:at] + b"\xff\xd3\x77" + odd[at + 3 :], odd[:at]):
        with pytest.raises(BadSample):
            decode(damaged, LIMIT)


def test_odd_jpegs_are_rotated_too():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        payload = segment(0xE1, b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0"))
        for data in (saved(picture()), sampled_jpeg(factors_of("4x2 1x1 1x1"))):
            odd = with_segments(data, b"junk", payload)
            height, width = decode(odd, LIMIT).shape[:2]
            assert ((height, width) == (WIDTH, HEIGHT)) == (orientation >= 5)
            assert (measure(odd).height, measure(odd).width) == (height, width)


def test_jpegs_of_hundreds_of_scans_are_rejected():
    data = saved(Image.fromarray(picture()).convert("L"), progressive=True)
    scans = [each for each in jpeg.segments(data) if each.marker == 0xDA]
    again = data[scans[0].start - 4 : scans[0].stop]
    at = scans[0].stop
    assert decode(data, LIMIT).shape == (HEIGHT, WIDTH, 3)
    many = data[:at] + (jpeg.MAX_SCANS - len(scans) + 1) * again + data[at:]
    with pytest.raises(BadSample, match="more than 100 scans"):
        decode(many, LIMIT)


def test_extra_scans_of_sequential_jpegs_are_rejected():
    """The first scan contains all components, so that decoders read no other one and fail on the surplus."""
    data = saved(picture())
    (scan,) = [each for each in jpeg.segments(data) if each.marker == 0xDA]
    many = data[: scan.stop] + jpeg.MAX_SCANS * data[scan.start - 4 : scan.stop] + data[scan.stop :]
    assert jpeg.read_header(many).has_one_scan
    with pytest.raises(BadSample, match="more than 100 scans"):
        decode(many, LIMIT)


def test_scans_are_counted_in_every_mode():
    data = saved(picture())
    (scan,) = [each for each in jpeg.segments(data) if each.marker == 0xDA]
    of_one = data[: scan.start - 2] + b"\0\x08\x01\x01\0\0\x3f\0" + data[scan.end :]
    for many in (of_one, data[: scan.start + 1]):
        assert not jpeg.read_header(many).has_one_scan
    progressive = saved(picture(), progressive=True)
    assert not jpeg.read_header(progressive).has_one_scan


def test_metadata_is_not_counted_as_scans():
    data = with_segments(saved(picture()), *10 * [segment(0xE1, b"Exif\0\0" + 50 * b"\xff\xda\0\x08")])
    assert decode(data, LIMIT).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(("place", "value"), [(slice(0, 1), b"\x0c"), (slice(1, 3), b"\0\0"), (slice(3, 5), b"\0\0")])
def test_jpegs_of_12_bits_or_without_pixels_are_bad(place, value):
    data = bytearray(saved(picture()))
    frame = data.index(b"\xff\xc0") + 4
    data[frame + place.start : frame + place.stop] = value
    with pytest.raises(BadSample):
        decode(bytes(data), LIMIT)
