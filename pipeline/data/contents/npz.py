"""Reading an npz that anyone may have written: sizes are known before memory is given, nothing is ever unpickled."""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np

_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others may ask for memory beyond what they hold


class Npz:
    """The arrays that `numpy.savez` or `savez_compressed` wrote, read one by one.

    Making one and reading raise whatever zipfile and numpy raise for damaged bytes, of any type.
    """

    def __init__(self, data: bytes):
        self._archive = zipfile.ZipFile(io.BytesIO(data))
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in self._archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str, kinds: str, max_bytes: int) -> np.ndarray:
        """One array whose dtype is of one of numpy's `kinds` and takes at most 8 bytes a number.

        Raises KeyError when there is none, ValueError when it is of another kind or would take more than `max_bytes`.
        """
        entry = self._entries[name]
        if entry.file_size > max_bytes:
            raise ValueError(f"{name} would take {entry.file_size} bytes, more than {max_bytes}")
        if entry.compress_type not in _PLAIN:
            raise ValueError(f"{name} is packed by a method that numpy does not use")
        with self._archive.open(entry) as packed:
            content = packed.read(entry.file_size)  # told how much, zipfile unpacks no more than that
        stream = io.BytesIO(content)
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of version {version} of the npy format; expected 1.0 or 2.0")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read_header(stream)
        if kind.kind not in kinds or kind.itemsize > 8:
            raise ValueError(f"{name} are {kind}; expected numpy's kind {' or '.join(kinds)}")
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(content) - stream.tell():
            raise ValueError(f"{name} states shape {shape}, and holds {len(content) - stream.tell()} bytes of {kind}")
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)
