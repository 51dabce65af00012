"""A checkpoint's fragments, read by parameter and range whatever ranks wrote them: only what is asked for travels."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError
from pipeline.data.storage import ObjectInfo, Storage, join
from pipeline.training.checkpoint.tensor_file import LENGTH

_MEMORY = 256 * 2**20  # bytes kept of what was read
_SMALLEST, _LARGEST = 2**16, 8 * 2**20  # bytes of one request
_AHEAD = 2  # blocks fetched before they are asked for
_THREADS = 4


class SavedState:
    """The state in `files`, each with the version that was verified: no other is read (a FragmentSource)."""

    def __init__(self, storage: Storage, url: str, files: Mapping[str, ObjectInfo], optimizer_step: int):
        self.optimizer_step = optimizer_step
        self._url = url
        self._blocks = _Blocks(storage, url, files)
        # (name, kind) -> (first element, number of elements, file, first byte), in order
        self._parts: dict[tuple[str, str], list[tuple[int, int, str, int]]] = {}
        for file in files:
            self._index(file)
        for parts in self._parts.values():
            parts.sort()

    def _index(self, file: str) -> None:
        (length,) = LENGTH.unpack(self._blocks.read(file, 0, LENGTH.size))
        body = LENGTH.size + length
        for key, entry in json.loads(self._blocks.read(file, LENGTH.size, body)).items():
            name, start, kind = key.rsplit("|", 2)
            if entry["dtype"] != "F32":
                raise CheckpointError(f"{self._url}: {file} holds {key} as {entry['dtype']}; expected F32")
            part = (int(start), entry["shape"][0], file, body + entry["data_offsets"][0])
            self._parts.setdefault((name, kind), []).append(part)

    def holds(self, name: str, kind: str) -> bool:
        return (name, kind) in self._parts

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements start … stop of a parameter's weight, moment or average, 1-d float32.

        Raises CheckpointError when they are not all there, StorageError when the store does not answer.
        """
        result = torch.empty(stop - start)
        target = result.view(torch.uint8).numpy()
        filled = 0
        for offset, length, file, at in self._parts.get((name, kind), []):
            low, high = max(start, offset), min(stop, offset + length)
            if low < high:
                data = self._blocks.read(file, at + 4 * (low - offset), at + 4 * (high - offset))
                target[4 * (low - start) : 4 * (high - start)] = np.frombuffer(data, np.uint8)
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(
                f"{self._url}: holds {filled} of the {stop - start} elements {start}…{stop} of {name} ({kind}); "
                "it was written by another architecture or another frozen set"
            )
        return result


class _Blocks:
    """Ranges of several files, through a cache of blocks that are fetched ahead.

    An engine reads forward, at a handful of places of every file at once (its weights, its moments). The block is so
    small that the cache holds the next ones of all these places.
    """

    _PLACES = 4  # of each file

    def __init__(self, storage: Storage, url: str, files: Mapping[str, ObjectInfo]):
        self._storage, self._url, self._files = storage, url, files
        places = self._PLACES * len(files)
        self._size = min(max(_MEMORY // ((_AHEAD + 1) * places), _SMALLEST), _LARGEST)
        self._most = max(_MEMORY // self._size, (_AHEAD + 1) * places)
        self._kept: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_THREADS, "restore")  # its threads end when nothing refers to it

    def read(self, file: str, start: int, stop: int) -> bytes:
        found = []
        for index in range(start // self._size, -(-stop // self._size)):
            begin = index * self._size
            found.append(self._block(file, index)[max(start - begin, 0) : stop - begin])
        return found[0] if len(found) == 1 else b"".join(found)

    def _block(self, file: str, index: int) -> bytes:
        for ahead in range(_AHEAD, -1, -1):  # the one asked for last: it is then the one used last
            self._ask(file, index + ahead)
        return self._kept[file, index].result()

    def _ask(self, file: str, index: int) -> None:
        info = self._files[file]
        start, stop = index * self._size, min((index + 1) * self._size, info.size)
        if (file, index) in self._kept:
            self._kept.move_to_end((file, index))
        elif start < stop:
            url = join(self._url, file)
            self._kept[file, index] = self._pool.submit(self._storage.read_range, url, start, stop, info.etag)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
