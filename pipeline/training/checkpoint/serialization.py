"""Checkpoint state as safetensors files: copied to host memory, written in parts, and read back by range.

A file is 8 bytes of header length, a JSON header, and the tensors (https://github.com/huggingface/safetensors#format).
"""

import bisect
import hashlib
import itertools
import json
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError
from pipeline.data.storage import ObjectInfo, Storage, join
from pipeline.training.engine import Fragment

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LENGTH = struct.Struct("<Q")
_HASH_BYTES = 16 * 2**20  # hashed at a time
_CACHE_BYTES = 256 * 2**20
_MIN_BLOCK, _MAX_BLOCK = 2**16, 8 * 2**20  # bytes of one request
_READAHEAD = 2  # blocks
_THREADS = 4
_STREAMS = 4  # positions at which an engine reads each file concurrently: weights, moments, average


@dataclass
class HostCopy:
    """Copies a rank's fragments into one host buffer that is reused by every save; pinned if the device is a GPU."""

    device: torch.device
    buffer: Tensor = field(default_factory=partial(torch.empty, 0))

    def reserve(self, fragments: Iterable[Fragment]) -> dict[str, Tensor]:
        """Allocate the buffer ahead of the first `take`; return the values by "name|start|kind", grouped by kind."""
        by_kind = sorted(((kind, part) for part in fragments for kind in part.values), key=lambda key: key[0])
        values = {f"{part.name}|{part.start}|{kind}": part.values[kind] for kind, part in by_kind}
        size = sum(len(value) for value in values.values())
        if len(self.buffer) < size:
            self.buffer = torch.zeros(size, pin_memory=self.device.type == "cuda")  # zeroing maps the pages now
        return values

    def take(self, fragments: Iterable[Fragment]) -> dict[str, Tensor]:
        """Return float32 copies of the values of `reserve`, valid until the next `take`."""
        copies, offset = {}, 0
        with torch.no_grad():
            for key, value in self.reserve(fragments).items():
                copies[key] = self.buffer[offset : offset + len(value)]
                copies[key].copy_(value, non_blocking=True)
                offset += len(value)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the next step overwrites the source
        return copies


class TensorFile:
    """A safetensors file of CPU tensors, never held as a whole; the tensors must not change while it is read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        header: dict[str, Any] = {}
        chunks, offset = [], 0
        for name, tensor in tensors.items():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            offsets = [offset, offset + len(data)]
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            offset += len(data)
            if data:
                chunks.append(data)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH.size)  # aligns the tensors
        self._chunks = [memoryview(LENGTH.pack(len(text)) + text), *chunks]
        self._starts = list(itertools.accumulate((len(chunk) for chunk in self._chunks), initial=0))
        self.size = self._starts[-1]

    def read(self, start: int, stop: int) -> bytes:
        """Return a copy of the bytes [start, stop)."""
        first, end = bisect.bisect_right(self._starts, start) - 1, bisect.bisect_left(self._starts, stop)
        chunks = zip(self._chunks[first:end], self._starts[first:end], strict=False)
        return b"".join(chunk[max(start - begin, 0) : stop - begin] for chunk, begin in chunks)

    def record(self) -> dict[str, Any]:
        """Return the file's manifest entry: its size in bytes and its SHA-256."""
        digest = hashlib.sha256()
        for chunk in self._chunks:
            for start in range(0, len(chunk), _HASH_BYTES):
                digest.update(chunk[start : start + _HASH_BYTES])
        return {"bytes": self.size, "sha256": digest.hexdigest()}


class SavedState:
    """A checkpoint's state, read by parameter and range whichever ranks wrote it; only verified versions of `files`."""

    def __init__(self, storage: Storage, url: str, files: Mapping[str, ObjectInfo], optimizer_step: int):
        self.optimizer_step = optimizer_step
        self._storage, self._url, self._files = storage, url, files
        streams = _STREAMS * len(files)
        self._block_bytes = min(max(_CACHE_BYTES // ((_READAHEAD + 1) * streams), _MIN_BLOCK), _MAX_BLOCK)
        self._capacity = max(_CACHE_BYTES // self._block_bytes, (_READAHEAD + 1) * streams)
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_THREADS, "restore")  # its threads end when the pool is garbage-collected
        # (name, kind) -> sorted list of (first element, number of elements, file, byte offset)
        self.parts: dict[tuple[str, str], list[tuple[int, int, str, int]]] = {}
        for file in files:
            (length,) = LENGTH.unpack(self._read_bytes(file, 0, LENGTH.size))
            body = LENGTH.size + length
            for key, entry in json.loads(self._read_bytes(file, LENGTH.size, body)).items():
                name, start, kind = key.rsplit("|", 2)
                if entry["dtype"] != "F32":
                    raise CheckpointError(f"{url}: {file} holds {key} as {entry['dtype']}; expected F32")
                part = (int(start), entry["shape"][0], file, body + entry["data_offsets"][0])
                bisect.insort(self.parts.setdefault((name, kind), []), part)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a parameter's `kind`, 1-d float32; CheckpointError if some are missing."""
        result, num_read = torch.empty(stop - start), 0
        target = result.view(torch.uint8).numpy()
        for offset, length, file, position in self.parts.get((name, kind), []):
            low, high = max(start, offset), min(stop, offset + length)
            if low < high:
                data = self._read_bytes(file, position + 4 * (low - offset), position + 4 * (high - offset))
                target[4 * (low - start) : 4 * (high - start)] = np.frombuffer(data, np.uint8)
                num_read += high - low
        if num_read != stop - start:
            raise CheckpointError(
                f"{self._url}: holds {num_read} of the {stop - start} elements {start}…{stop} of {name} ({kind}); "
                "it was written for another architecture or another set of frozen parameters"
            )
        return result

    def _read_bytes(self, file: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a file, fetching the blocks after them in the background."""
        info, size, parts = self._files[file], self._block_bytes, []
        for index in range(start // size, -(-stop // size)):
            for block in range(index + _READAHEAD, index - 1, -1):  # the requested one last: the most recently used
                if (file, block) in self._blocks:
                    self._blocks.move_to_end((file, block))
                elif block * size < info.size:
                    bounds = block * size, min((block + 1) * size, info.size)
                    url = join(self._url, file)
                    self._blocks[file, block] = self._pool.submit(self._storage.read, url, *bounds, info.etag)
                    if len(self._blocks) > self._capacity:
                        self._blocks.popitem(last=False)
            parts.append(self._blocks[file, index].result()[max(start - index * size, 0) : stop - index * size])
        return parts[0] if len(parts) == 1 else b"".join(parts)
