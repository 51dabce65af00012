"""The structure of a JPEG file: its segments, its header, and whether its entropy-coded data is intact.

A strict decoder stops at the first warning, whether the metadata or the pixels are damaged. `without_metadata` removes
what cannot affect the pixels, so that the rest can be decoded strictly; `check_entropy` validates the files whose
chroma sampling the strict decoder does not support.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pipeline.data.quarantine import BadSample

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
SOS, DHT, DRI, APP0, APP1, APP14, COM = 0xDA, 0xC4, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE
APPLICATION = range(0xE0, 0xF0)
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}  # SOF0 … SOF15
SEQUENTIAL, PROGRESSIVE = frozenset({0xC0, 0xC1}), frozenset({0xC2})  # those with Huffman codes
MAX_SCANS = 100  # encoders write about 10
MAX_CHECKED_BLOCKS = 10_000_000  # per file, in all scans: about 10 s
LOOK_AHEAD = 64  # bits that libjpeg reads ahead: it does not notice surplus data within them at the end
EXIF = b"Exif\x00\x00"

_NEXT_MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_RESTART = re.compile(rb"\xff+([\xd0-\xd7])")
_STUFFED = re.compile(rb"\xff+\x00")
_PARAMETERLESS = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # stuffing, TEM, RST0 … RST7, SOI
_JFIF = b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


class Segment(NamedTuple):
    """A marker segment with payload data[start:end]; a scan's entropy-coded data is data[end:stop]."""

    marker: int
    start: int
    end: int
    stop: int


class Component(NamedTuple):
    """A colour component of a frame: its identifier and sampling factors."""

    identifier: int
    horizontal: int
    vertical: int


class Header(NamedTuple):
    """A frame header."""

    frame: int  # the marker: SOF0 …
    height: int
    width: int
    components: tuple[Component, ...]


def segments(data: bytes, headers_only: bool = False) -> Iterator[Segment]:
    """Yield the segments up to the end-of-image marker or the end of the data; raise ValueError for a truncated one.

    With `headers_only`, stop after the first scan's header.
    """
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
    """Return the frame header. Raises ValueError without one, or without 8 bits per sample and at least one pixel."""
    for marker, start, end, _ in segments(data, headers_only=True):
        if marker in FRAMES:
            return _parse_header(marker, data[start:end])
    raise ValueError("no frame header before the end of the file")


def _parse_header(marker: int, payload: bytes) -> Header:
    if len(payload) < 6 or len(payload) != 6 + 3 * payload[5]:
        raise ValueError("the frame header has a wrong length")
    if payload[0] != 8:
        raise ValueError(f"{payload[0]} bits per sample; expected 8")
    height, width = int.from_bytes(payload[1:3], "big"), int.from_bytes(payload[3:5], "big")
    components = tuple(
        Component(payload[at], payload[at + 1] >> 4, payload[at + 1] & 15) for at in range(6, len(payload), 3)
    )
    if not height or not width or not components:
        raise ValueError(f"an image of {width} x {height} pixels and {len(components)} components")
    if not all(1 <= factor <= 4 for component in components for factor in component[1:]):
        raise ValueError("a sampling factor is not in 1 … 4")
    return Header(marker, height, width, components)


def has_one_scan(data: bytes, header: Header) -> bool:
    """Return whether the first scan holds all components of a sequential frame: decoders then read no other scan."""
    if header.frame not in SEQUENTIAL:
        return False
    try:
        scans = (data[start] for marker, start, _, _ in segments(data, headers_only=True) if marker == SOS)
        return next(scans, 0) == len(header.components)
    except (ValueError, IndexError):
        return False


def refuse_many_scans(data: bytes) -> None:
    """Raise BadSample for more than MAX_SCANS scans."""
    # Counting markers is fast, and never below the number of scans: thumbnails in the metadata count too.
    if data.count(bytes([0xFF, SOS])) > MAX_SCANS and sum(part.marker == SOS for part in segments(data)) > MAX_SCANS:
        raise BadSample("image", f"more than {MAX_SCANS} scans, each of which costs a pass over all pixels")


def exif_of(data: bytes) -> bytes | None:
    """Return the first EXIF payload before the pixels."""
    try:
        for marker, start, end, _ in segments(data, headers_only=True):
            if marker == APP1 and data[start : start + len(EXIF)] == EXIF:
                return data[start:end]
    except ValueError:
        pass
    return None


def without_metadata(data: bytes) -> bytes:
    """Return the same image without metadata, junk between segments, and fields that decoders ignore.

    What decides the colour space (JFIF, Adobe) is kept, as libjpeg reads it. A missing end marker stays missing.
    """
    parts = [SOI]
    num_components = frame = 0
    for marker, start, end, stop in segments(data):
        payload = data[start:end]
        if marker == EOI[1]:
            parts.append(EOI)
            break
        if marker in FRAMES:
            frame, num_components = marker, len(_parse_header(marker, payload).components)
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


# Entropy-coded data ---------------------------------------------------------------------------------------------------

_Table = list[int]  # by the next 16 bits: length of the code << 8 | symbol; 0 where no code begins so


def check_entropy(data: bytes) -> None:
    """Raise ValueError unless every scan's Huffman codes give exactly the blocks that the header announces.

    libjpeg warns of every fault that is found here, and a strict decoder refuses it: invalid codes, missing and surplus
    data, restart markers out of order. `data` comes from `without_metadata`.
    """
    tables: dict[int, _Table] = {}
    restart = checked = surplus = 0
    header: Header | None = None
    history: dict[int, list[int]] = {}
    marker = 0
    for marker, start, end, stop in segments(data):
        payload = data[start:end]
        if surplus >= (LOOK_AHEAD if marker == EOI[1] else 8):
            raise ValueError("extraneous entropy-coded data")
        if marker in FRAMES:
            header = _parse_header(marker, payload)
        elif marker == DHT:
            tables |= _huffman_tables(payload)
        elif marker == DRI:
            restart = int.from_bytes(payload, "big")
        elif marker == SOS:
            if header is None or header.frame not in SEQUENTIAL | PROGRESSIVE:
                raise ValueError("entropy-coded data that cannot be checked (arithmetic or lossless coding)")
            scan = _Scan(header, payload, tables, history)
            checked += scan.num_blocks
            if checked > MAX_CHECKED_BLOCKS:
                raise ValueError(f"more than {MAX_CHECKED_BLOCKS} blocks in a chroma sampling that is slow to check")
            surplus = scan.check(data[end:stop], restart)
    if marker != EOI[1]:
        raise ValueError("the file ends before its end-of-image marker")


def _huffman_tables(payload: bytes) -> dict[int, _Table]:
    """Return the tables of a DHT segment by class << 4 | number."""
    tables = {}
    while payload:
        counts, symbols = payload[1:17], payload[17 : 17 + sum(payload[1:17])]
        if len(counts) < 16 or len(symbols) < sum(counts):
            raise ValueError("a Huffman table is truncated")
        table: _Table = []
        at = 0
        for length, count in enumerate(counts, 1):
            for symbol in symbols[at : at + count]:
                table += [length << 8 | symbol] * (1 << 16 - length)
            at += count
        if len(table) > 1 << 16:
            raise ValueError("a Huffman table has more codes than its lengths allow")
        tables[payload[0]] = table + [0] * ((1 << 16) - len(table))
        payload = payload[17 + len(symbols) :]
    return tables


class _Bits:
    """The bits of a restart interval, followed by enough zeros for one block."""

    def __init__(self, interval: bytes):
        plain = _STUFFED.sub(b"\xff", interval.rstrip(b"\xff"))  # a data byte 0xff is stuffed; others are fill bytes
        padded = np.frombuffer(plain + bytes(512), np.uint8).astype(np.uint32)
        self.windows: list[int] = (padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]).tolist()
        self.length = 8 * len(plain)
        self.position = 0

    def number(self, size: int) -> int:
        """Return the next `size` bits, at most 16, as a number."""
        value = (self.windows[self.position >> 3] >> 8 - (self.position & 7) & 0xFFFF) >> 16 - size
        self.position += size
        return value

    def symbol(self, table: _Table) -> int:
        """Return the symbol of the next Huffman code."""
        entry = table[self.windows[self.position >> 3] >> 8 - (self.position & 7) & 0xFFFF]
        if not entry:
            raise ValueError("an invalid Huffman code")
        self.position += entry >> 8
        return entry & 0xFF


_BlockReader = Callable[[_Bits, int, _Table, _Table], None]  # (bits, unit, DC table, AC table)


class _Scan:
    """A scan: its blocks, their order, and how each is coded.

    A unit holds the blocks that are coded together: one block of each component, as often as its sampling factors say.
    `history` keeps for each component a bit mask per block of the coefficients that earlier progressive scans set.
    """

    def __init__(self, header: Header, payload: bytes, tables: dict[int, _Table], history: dict[int, list[int]]):
        if not payload or len(payload) != 4 + 2 * payload[0]:
            raise ValueError("a scan header has a wrong length")
        by_identifier = {component.identifier: component for component in header.components}
        scanned = [(payload[at], payload[at + 1]) for at in range(1, len(payload) - 3, 2)]
        if not scanned or any(identifier not in by_identifier for identifier, _ in scanned):
            raise ValueError("a scan of a component that the frame lacks")
        self._first, self._last, self._is_refinement = payload[-3], payload[-2], payload[-1] >> 4 > 0
        is_progressive = header.frame in PROGRESSIVE
        is_dc = is_progressive and self._first == 0
        if is_progressive and (self._first > self._last or self._last > 63 or (is_dc and self._last > 0)):
            raise ValueError("a progressive scan of impossible coefficients")
        across = max(component.horizontal for component in header.components)
        down = max(component.vertical for component in header.components)
        if len(scanned) == 1:  # not interleaved: the component's own blocks, row by row
            component = by_identifier[scanned[0][0]]
            columns = math.ceil(math.ceil(header.width * component.horizontal / across) / 8)
            rows = math.ceil(math.ceil(header.height * component.vertical / down) / 8)
            per_unit = [1]
        else:
            columns, rows = math.ceil(header.width / (8 * across)), math.ceil(header.height / (8 * down))
            per_unit = [by_identifier[name].horizontal * by_identifier[name].vertical for name, _ in scanned]
        self._units = columns * rows
        self.num_blocks = self._units * sum(per_unit)
        self._eob_run = 0  # blocks that an end-of-band code has ended ahead of time

        read: _BlockReader
        if is_dc:
            read = self._read_dc
        elif not is_progressive:
            read = self._read_sequential
        elif len(scanned) > 1:
            raise ValueError("a progressive scan of AC coefficients with several components")
        else:
            self._masks = history.setdefault(scanned[0][0], [0] * self._units)
            read = self._refine_ac if self._is_refinement else self._read_ac
        needs_dc, needs_ac = not is_progressive or (is_dc and not self._is_refinement), not is_dc
        self._unit: list[tuple[_BlockReader, _Table, _Table]] = []
        for (_, chosen), count in zip(scanned, per_unit, strict=True):
            dc, ac = tables.get(chosen >> 4), tables.get(0x10 | chosen & 15)
            if (needs_dc and dc is None) or (needs_ac and ac is None):
                raise ValueError("a scan with an undefined Huffman table")
            self._unit += [(read, dc or [], ac or [])] * count

    def check(self, entropy: bytes, restart: int) -> int:
        """Return the number of bits after the scan's blocks. Raises ValueError unless it has exactly these blocks."""
        parts = _RESTART.split(entropy)
        intervals, markers = parts[::2], parts[1::2]
        if any(marker[0] != 0xD0 + number % 8 for number, marker in enumerate(markers)):
            raise ValueError("a restart marker is missing or out of order")
        expected = math.ceil(self._units / restart) if restart else 1
        if len(intervals) != expected:
            raise ValueError(f"{len(intervals)} restart intervals; expected {expected}")
        at = surplus = 0
        for interval in intervals:
            if surplus >= 8:
                raise ValueError("extraneous entropy-coded data before a restart marker")
            bits = _Bits(interval)
            self._eob_run = 0
            stop = min(self._units, at + restart) if restart else self._units
            for unit in range(at, stop):
                for read, dc, ac in self._unit:
                    read(bits, unit, dc, ac)
                    if bits.position > bits.length:
                        raise ValueError("entropy-coded data ends too early")
            surplus = bits.length - bits.position
            at = stop
        return surplus

    def _read_sequential(self, bits: _Bits, _: int, dc: _Table, ac: _Table) -> None:
        size = bits.symbol(dc) & 15
        bits.position += size
        windows, position, at = bits.windows, bits.position, 1
        while at < 64:  # `bits.symbol` in place, for speed
            entry = ac[windows[position >> 3] >> 8 - (position & 7) & 0xFFFF]
            if not entry:
                raise ValueError("an invalid Huffman code")
            position += (entry >> 8) + (entry & 15)
            if entry & 15 or entry & 0xFF == 0xF0:
                at += (entry >> 4 & 15) + 1
            else:
                break
        bits.position = position

    def _read_dc(self, bits: _Bits, _: int, dc: _Table, __: _Table) -> None:
        size = 1 if self._is_refinement else bits.symbol(dc) & 15
        bits.position += size

    def _read_ac(self, bits: _Bits, unit: int, _: _Table, ac: _Table) -> None:
        """Read a block of a first AC scan, and record its non-zero coefficients (ITU T.81, G.1.2.2)."""
        if self._eob_run:
            self._eob_run -= 1
            return
        at = self._first
        while at <= self._last:
            run, size = divmod(bits.symbol(ac), 16)
            if size:
                self._masks[unit] |= 1 << min(at + run, 63)
                bits.position += size
            elif run < 15:
                self._eob_run = (1 << run) - 1 + bits.number(run)
                return
            at += run + 1

    def _refine_ac(self, bits: _Bits, unit: int, _: _Table, ac: _Table) -> None:
        """Read a block of a refining scan: one bit for each coefficient known to be non-zero (G.1.2.3)."""
        at, mask = self._first, self._masks[unit]
        while at <= self._last and not self._eob_run:
            run, size = divmod(bits.symbol(ac), 16)
            if size > 1:
                raise ValueError("an invalid Huffman code")
            if not size and run < 15:
                self._eob_run = (1 << run) + bits.number(run)
                break
            bits.position += size
            while at <= self._last:
                if mask >> at & 1:
                    bits.position += 1
                elif run:
                    run -= 1
                else:
                    break
                at += 1
            if size:
                self._masks[unit] |= 1 << min(at, 63)
            at += 1
        if self._eob_run:
            remaining = (1 << max(0, self._last + 1 - at)) - 1
            bits.position += (mask >> at & remaining).bit_count()
            self._eob_run -= 1
