"""The structure of a JPEG file: its segments, its header, and the same image without metadata."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.data.quarantine import BadSample

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
SOS, APP0, APP1, APP14, COM = 0xDA, 0xE0, 0xE1, 0xEE, 0xFE
APPLICATION = range(0xE0, 0xF0)
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 … SOF15
SEQUENTIAL = (0xC0, 0xC1)  # those of sequential scans with Huffman codes
MAX_SCANS = 100  # encoders write about 10

_NEXT_MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_PARAMETERLESS = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # stuffing, TEM, RST0 … RST7, SOI
_JFIF = b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


class Segment(NamedTuple):
    """A marker segment with payload data[start:end]; a scan's entropy-coded data is data[end:stop]."""

    marker: int
    start: int
    end: int
    stop: int


class Header(NamedTuple):
    """The frame header and what else decides how a file is read."""

    height: int
    width: int
    num_components: int
    has_one_scan: bool  # the first scan has all components of a sequential frame: decoders then read no other scan
    exif: bytes | None  # the first EXIF payload before the pixels


def segments(data: bytes, headers_only: bool = False) -> Iterator[Segment]:
    """Yield the segments up to the end (`headers_only`: the first scan's header); raise ValueError for a cut one."""
    at = len(SOI)
    while (match := _NEXT_MARKER.search(data, at)) is not None:
        marker, at = match[1][0], match.end()
        if marker == EOI[1]:
            yield Segment(marker, at, at, at)
            return
        if marker in _PARAMETERLESS:
            continue
        start, end = at + 2, at + int.from_bytes(data[at : at + 2], "big")
        if not start <= end <= len(data):
            raise ValueError(f"segment {marker:#x} at byte {at} is truncated")
        at = end
        if marker == SOS:
            if headers_only:
                yield Segment(marker, start, end, end)
                return
            match = _END_OF_SCAN.search(data, end)
            at = match.start() if match else len(data)
        yield Segment(marker, start, end, at)


def read_header(data: bytes) -> Header:
    """Return the header. Raises ValueError without a frame of 8 bits per sample and at least one pixel."""
    frame, exif, has_one_scan = b"", None, False
    try:
        for marker, start, end, _ in segments(data, headers_only=True):
            if marker in FRAMES and not frame:
                frame = bytes([marker]) + data[start:end]
            elif marker == APP1 and exif is None and data.startswith(b"Exif\x00\x00", start, end):
                exif = data[start:end]
            elif marker == SOS and frame:
                has_one_scan = frame[0] in SEQUENTIAL and data[start:end][:1] == frame[6:7]
    except ValueError:
        if not frame:
            raise
    if len(frame) < 7 or len(frame) != 7 + 3 * frame[6]:
        raise ValueError("the frame header is missing or has a wrong length")
    if frame[1] != 8:
        raise ValueError(f"{frame[1]} bits per sample; expected 8")
    height, width = int.from_bytes(frame[2:4], "big"), int.from_bytes(frame[4:6], "big")
    if not height or not width or not frame[6]:
        raise ValueError(f"an image of {width} x {height} pixels and {frame[6]} components")
    if not all(1 <= factor <= 4 for factors in frame[8::3] for factor in (factors >> 4, factors & 15)):
        raise ValueError("a sampling factor is not in 1 … 4")
    return Header(height, width, frame[6], has_one_scan, exif)


def refuse_many_scans(data: bytes) -> None:
    """Raise BadSample for more than MAX_SCANS scans."""
    # Counting markers is fast, and never below the number of scans: thumbnails in the metadata count too.
    if data.count(bytes([0xFF, SOS])) > MAX_SCANS and sum(part.marker == SOS for part in segments(data)) > MAX_SCANS:
        raise BadSample("image", f"more than {MAX_SCANS} scans, each of which costs a pass over all pixels")


def without_metadata(data: bytes) -> bytes:
    """Return the same image without metadata, except for its colour space: strict decoding then checks the pixels."""
    parts, num_components, frame = [SOI], 0, 0
    for marker, start, end, stop in segments(data):
        payload = data[start:end]
        if marker == EOI[1]:
            parts.append(EOI)
            break
        if marker in FRAMES:
            frame, num_components = marker, payload[5]
        elif marker == APP0 and payload.startswith(b"JFIF\x00") and len(payload) >= len(_JFIF):
            payload = _JFIF
        elif marker == APP14 and payload.startswith(b"Adobe") and len(payload) >= 12:
            payload = b"Adobe\x00\x64\x00\x00\x00\x00" + bytes([payload[11]])
        elif marker in APPLICATION or marker == COM:
            continue
        elif marker == SOS and frame in SEQUENTIAL:
            payload = payload[:-3] + b"\x00\x3f\x00"  # a sequential scan has all coefficients, whatever it says
        parts.append(bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload + data[end:stop])
    plain = b"".join(parts)
    at = plain.find(b"\xff\xee\x00\x0eAdobe")  # an unknown colour transform becomes the one that libjpeg assumes
    known, assumed = ((0, 1), 1) if num_components == 3 else ((0, 2), 2)
    if at < 0 or plain[at + 15] in known:
        return plain
    return plain[: at + 15] + bytes([assumed]) + plain[at + 16 :]
