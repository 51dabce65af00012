"""JPEGs of cameras and editors: decoded if only metadata is odd, refused if pixels are damaged."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.contents import jpeg
from pipeline.data.contents.images import ImageSize, decode, measure
from pipeline.data.quarantine import BadSample
from tests.support.encoded_images import encoded, picture, rotation, sampled_jpeg, segment, with_segments

LIMIT = 1_000_000
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


def pillows(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def assert_bad(data: bytes, reason: str = "") -> None:
    with pytest.raises(BadSample, match=reason):
        decode(data, LIMIT)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", STRICT + LENIENT)
def test_every_chroma_sampling_decodes_as_in_pillow_unless_its_pixels_are_damaged(sampling, progressive):
    """Of the samplings that only Pillow knows, cut files alone are detected."""
    data = sampled_jpeg(sampling, progressive)
    assert (decode(data, LIMIT) == pillows(data)).all()
    assert measure(data) == ImageSize(HEIGHT, WIDTH)
    begin = data.index(b"\xff\xda") + 20
    cuts = [data[: int(begin + fraction * (len(data) - 2 - begin))] for fraction in (0.0, 0.3, 0.7, 0.99)]
    for cut in cuts:
        assert_bad(cut)
    if sampling in STRICT:
        at = (begin + len(data)) // 2
        for damaged in (*(cut + jpeg.EOI for cut in cuts), data[:at] + b"\xff\xd3\x77" + data[at + 3 :]):
            assert_bad(damaged)
        assert_bad(data[:-2] + 32 * b"\x12\x34" + data[-2:], "extraneous")


EXIF_OFFSET = b"Exif\0\0II*\0\x08\0\0\0"
ICC = b"ICC_PROFILE\0"
ODD = {
    "junk between segments": lambda data: with_segments(data, b"\x00\x12\x34", before=0xDB),
    "stuffed junk": lambda data: with_segments(data, b"\xff\x00\xff\x00", before=0xC4),
    "junk behind SOI": lambda data: with_segments(data, b"\0\0"),
    "fill bytes": lambda data: with_segments(data, b"\xff\xff\xff", before=0xDB),
    "ICC out of order": lambda data: with_segments(data, *(segment(0xE2, ICC + part) for part in (b"\2\2a", b"\1\2b"))),
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
    data = encoded(Image.fromarray(picture(HEIGHT, WIDTH)).convert(mode), "JPEG", quality=90)
    odd = ODD[oddity](data)
    assert odd != data
    assert (decode(odd, LIMIT) == pillows(data)).all()
    assert measure(odd) == ImageSize(HEIGHT, WIDTH)
    at = (odd.index(b"\xff\xda") + len(odd)) // 2
    assert_bad(odd[:at] + b"\xff\xd3\x77" + odd[at + 3 :])
    assert_bad(odd[:at])


def test_odd_jpegs_are_rotated_too():
    for orientation in range(1, 9):
        payload = segment(0xE1, b"Exif\0\0" + rotation(orientation).tobytes().removeprefix(b"Exif\0\0"))
        for data in (PHOTO, sampled_jpeg("4x2 1x1 1x1")):
            odd = with_segments(data, b"junk", payload)
            height, width = (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)
            assert decode(odd, LIMIT).shape == (height, width, 3)
            assert measure(odd) == ImageSize(height, width)


def test_jpegs_of_hundreds_of_scans_of_12_bits_or_without_pixels_are_rejected():
    """A first scan of all components is the only one that decoders read: they fail on the surplus."""
    progressive = encoded(Image.fromarray(picture(HEIGHT, WIDTH)).convert("L"), "JPEG", progressive=True)
    for data, has_one_scan in ((PHOTO, True), (progressive, False)):
        scan = next(part for part in jpeg.segments(data) if part.marker == 0xDA)
        many = data[: scan.stop] + jpeg.MAX_SCANS * data[scan.start - 4 : scan.stop] + data[scan.stop :]
        assert jpeg.read_header(many).has_one_scan is has_one_scan
        assert decode(data, LIMIT).shape == (HEIGHT, WIDTH, 3)
        assert_bad(many, "more than 100 scans")
    (scan,) = [part for part in jpeg.segments(PHOTO) if part.marker == 0xDA]
    of_one_component = PHOTO[: scan.start - 2] + b"\0\x08\x01\x01\0\0\x3f\0" + PHOTO[scan.end :]
    for data in (of_one_component, PHOTO[: scan.start + 1]):
        assert not jpeg.read_header(data).has_one_scan
    metadata = 10 * [segment(0xE1, b"Exif\0\0" + 50 * b"\xff\xda\0\x08")]  # contains no scans
    assert decode(with_segments(PHOTO, *metadata), LIMIT).shape == (HEIGHT, WIDTH, 3)
    frame = PHOTO.index(b"\xff\xc0") + 4
    for at, value in ((frame, b"\x0c"), (frame + 1, b"\0\0"), (frame + 3, b"\0\0")):  # 12 bits, and no pixels
        assert_bad(PHOTO[:at] + value + PHOTO[at + len(value) :])
