"""A safetensors file that is never held as a whole: made of tensors in memory, and given out by ranges of its bytes.

The format (https://github.com/huggingface/safetensors#format): 8 bytes that hold the length of a JSON header, the
header with every tensor's type, shape and place, and the tensors' bytes, here in the order in which they are given.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
_PIECE = 16 * 2**20  # bytes hashed at a time


class TensorFile:
    """The file of `tensors`, which are CPU tensors and must stay as they are while it is read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        bodies = {name: _bytes_of(tensor) for name, tensor in tensors.items()}
        head, at = {}, 0
        for name, tensor in tensors.items():
            stop = at + len(bodies[name])
            head[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
            at = stop
        header = json.dumps(head, separators=(",", ":")).encode()
        header += b" " * (-len(header) % LENGTH.size)  # so that the tensors are aligned
        self._pieces = [memoryview(LENGTH.pack(len(header)) + header), *(body for body in bodies.values() if body)]
        self._starts = [0]
        for piece in self._pieces:
            self._starts.append(self._starts[-1] + len(piece))
        self.size = self._starts[-1]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), copied."""
        first = bisect.bisect_right(self._starts, start) - 1
        found = []
        for piece, begin in zip(self._pieces[first:], self._starts[first:], strict=False):
            if begin >= stop:
                break
            found.append(piece[max(start - begin, 0) : stop - begin])
        return b"".join(found)

    def record(self) -> dict[str, Any]:
        """What a manifest says of the file."""
        digest = hashlib.sha256()
        for piece in self._pieces:
            for start in range(0, len(piece), _PIECE):
                digest.update(piece[start : start + _PIECE])
        return {"bytes": self.size, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
