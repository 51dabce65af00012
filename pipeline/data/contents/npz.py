"""Safe reading of untrusted npz files: sizes are checked before memory is allocated, nothing is unpickled."""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np

_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other methods may allocate memory beyond the content's size


def read_array(npz: zipfile.ZipFile, name: str, kinds: str, max_bytes: int) -> np.ndarray:
    """Return an array of a file of `numpy.savez`, whose dtype is one of numpy's `kinds` with at most 8 bytes a number.

    Raises KeyError when it is missing, ValueError for another dtype or more than `max_bytes` bytes, and exceptions of
    any type, from zipfile and numpy, for damaged bytes.
    """
    entry = npz.getinfo(f"{name}.npy")
    if entry.file_size > max_bytes:
        raise ValueError(f"{name} has {entry.file_size} bytes; expected at most {max_bytes}")
    if entry.compress_type not in _PLAIN:
        raise ValueError(f"{name} is compressed by a method that numpy does not use")
    with npz.open(entry) as packed:
        content = packed.read(entry.file_size)  # with a size, zipfile unpacks no more than that
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has version {version} of the npy format; expected 1.0 or 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.kind not in kinds or dtype.itemsize > 8:
        raise ValueError(f"{name} has dtype {dtype}; expected numpy's kind {' or '.join(kinds)}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"{name} declares shape {shape}, but has {len(content) - stream.tell()} bytes of {dtype}")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)
