"""Encoded images for the tests of decoders: in any format of Pillow, and JPEGs and PNGs assembled from parts."""

import functools
import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

from pipeline.data.contents import jpeg


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    """Return a smooth image without symmetry, so that every rotation gives a different image."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 9) * np.cos(y / 7)], axis=2)
    return image.astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def rotation(orientation: int) -> Image.Exif:
    """Return EXIF metadata with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(name: bytes, data: bytes, is_intact: bool = True) -> bytes:
    """Return a PNG's chunk, with a wrong checksum unless `is_intact`."""
    checksum = zlib.crc32(name + data) ^ (0 if is_intact else 1)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def with_segments(data: bytes, *added: bytes, before: int | None = None) -> bytes:
    """Return the JPEG with bytes inserted after its SOI, or before its first segment of a marker."""
    at = 2 if before is None else data.index(bytes([0xFF, before]))
    return data[:at] + b"".join(added) + data[at:]


@functools.cache
def sampled_jpeg(sampling: str, progressive: bool = False, height: int = 120, width: int = 164) -> bytes:
    """Return a JPEG of random DC coefficients in any sampling, as "2x2 1x1 1x1", of 1, 3 or 4 components."""
    standard = encoded(Image.new("RGB", (8, 8)), "JPEG")  # for its tables
    tables = [part for part in jpeg.segments(standard) if part.marker in (0xC4, 0xDB)]
    codes = {}  # of class << 4 | number and symbol
    for part in tables:
        payload, code, at = standard[part.start : part.end], 0, 17
        for length in range(1, 17) if part.marker == 0xC4 else ():
            for symbol in payload[at : at + payload[length]]:
                codes[payload[0], symbol] = format(code, f"0{length}b")
                code += 1
            at, code = at + payload[length], code << 1
    factors = [(int(part[0]), int(part[2])) for part in sampling.split()]
    coded = factors if len(factors) > 1 else [(1, 1)]
    across, down = (max(factor) for factor in zip(*coded, strict=True))
    rng, bits = random.Random(0), ""
    for _ in range(-(-width // (8 * across)) * -(-height // (8 * down))):
        for table, (h, v) in enumerate(coded):
            for _ in range(h * v):
                size = rng.randrange(1, 4)
                bits += codes[min(table, 1), size] + format(rng.getrandbits(size), f"0{size}b")
                bits += "" if progressive else codes[0x10 + min(table, 1), 0]
    bits += "1" * (-len(bits) % 8)
    entropy = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame, scan = struct.pack(">BHHB", 8, height, width, len(factors)), bytes([len(factors)])
    for number, (h, v) in enumerate(factors):
        frame += bytes([number + 1, h << 4 | v, min(number, 1)])
        scan += bytes([number + 1, min(number, 1) * 17])
    scan += b"\0\0\0" if progressive else b"\0\x3f\0"
    headers = b"".join(standard[part.start - 4 : part.end] for part in tables)
    return jpeg.SOI + headers + segment(0xC2 if progressive else 0xC0, frame) + segment(0xDA, scan) + entropy + jpeg.EOI
