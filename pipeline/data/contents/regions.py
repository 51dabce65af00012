"""A detector's regions of an image: parsing of the `.npz` member, and selection.

The member is what `numpy.savez` writes: `features` (R, F) float32 or float16; `boxes` (R, 4), x1 y1 x2 y2 in pixels;
`image_size` (height, width) of the boxes' coordinates; `classes` (R,) the detector's most likely class of each;
`confidences` (R,) its probability. The last three are optional: without a size the boxes' own extent is used, without
confidences the regions are ranked by their order, and without classes the objective moc cannot be trained. Sizes are
checked before memory is allocated, nothing is unpickled, and every fault is a BadSample.

Shapes: R regions, F features of a region.
"""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.data.contents.members import REGIONS, Members
from pipeline.data.quarantine import BadSample

MAX_BYTES = 64 * 2**20  # of one array: 8,192 regions of 2,048 numbers; a larger one is a bomb
MOST_CLASSES = 2**31
OUTSIDE = 1.0  # pixels that a box may extend beyond the image (detectors round); boxes are clipped
LOCATION = 5  # numbers of a region's location

_fault = partial(BadSample, "regions")
_KINDS = {"features": "f", "boxes": "fiu", "image_size": "iu", "classes": "iu", "confidences": "f"}  # of numpy's dtypes
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other methods may allocate memory beyond the content's size


def read_array(npz: zipfile.ZipFile, name: str, kinds: str, max_bytes: int) -> np.ndarray:
    """Return an .npz's array. Raises KeyError if missing, ValueError for its dtype or size, anything for damage."""
    entry = npz.getinfo(f"{name}.npy")
    if entry.file_size > max_bytes:
        raise ValueError(f"{name} has {entry.file_size} bytes; expected at most {max_bytes}")
    if entry.compress_type not in _PLAIN:
        raise ValueError(f"{name} is compressed by a method that numpy does not use")
    with npz.open(entry) as packed:
        content = packed.read(entry.file_size)  # with a size, zipfile unpacks no more than that
    stream = io.BytesIO(content)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if (version := np.lib.format.read_magic(stream)) not in headers:
        raise ValueError(f"{name} has version {version} of the npy format; expected 1.0 or 2.0")
    shape, _, dtype = headers[version](stream)
    if dtype.kind not in kinds or dtype.itemsize > 8:
        raise ValueError(f"{name} has dtype {dtype}; expected numpy's kind {' or '.join(kinds)}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"{name} declares shape {shape}, but has {len(content) - stream.tell()} bytes of {dtype}")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


@dataclass(frozen=True, eq=False)
class RegionRecord:
    """The regions of one image; all boxes are inside it."""

    features: np.ndarray  # (R, F) float32
    boxes: np.ndarray  # (R, 4) float32: x1, y1, x2, y2 in pixels
    image_size: tuple[int, int]  # height, width
    classes: np.ndarray | None = None  # (R,) int64
    confidences: np.ndarray | None = None  # (R,) float32

    def locations(self) -> np.ndarray:
        """Return x1 / W, y1 / H, x2 / W, y2 / H and the area fraction: (R, 5) float32 (ImageBERT, 3.1)."""
        height, width = self.image_size
        corners = self.boxes / np.array([width, height, width, height], dtype=np.float32)
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        return np.concatenate([corners, area[:, None]], axis=1).astype(np.float32)

    def to_bytes(self) -> bytes:
        """Return the member's content, a function of the regions alone."""
        arrays = {name: array for name, array in vars(self).items() if array is not None}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays | {"image_size": np.array(self.image_size, np.int64)})
        return buffer.getvalue()


def regions_of(
    members: Members, num_features: int | None = None, num_classes: int | None = None, most: int | None = None
) -> RegionRecord:
    """Return at most `most` of a sample's regions: the most confident, or the first ones without confidences. Raises
    BadSample unless they have `num_features` and classes below `num_classes`.
    """
    if REGIONS not in members:
        names = ", ".join(sorted(members)) or "none"
        raise BadSample("members", f"no regions ({REGIONS}; see `mome shards regions`); it has {names}")
    record = parse_regions(members[REGIONS])
    if num_features not in (None, record.features.shape[1]):
        raise _fault(f"{record.features.shape[1]} features per region, but model.region_features is {num_features}")
    if num_classes is not None:
        if record.classes is None:
            remedy = "extract the regions with a detector that predicts classes (`mome shards regions`)"
            raise _fault(f"no array 'classes', which the objective moc needs; {remedy}, or remove the objective")
        if (largest := record.classes.max()) >= num_classes:
            raise _fault(f"class {largest}, but model.region_classes is {num_classes}")
    if most is None or (total := len(record.features)) <= most:
        return record
    order = np.arange(total) if record.confidences is None else np.argsort(-record.confidences, kind="stable")
    best = {name: array[order[:most]] for name, array in vars(record).items() if isinstance(array, np.ndarray)}
    return RegionRecord(**vars(record) | best)


def parse_regions(data: bytes, image_size: tuple[int, int] | None = None) -> RegionRecord:
    """Return a member's regions, with boxes clipped to the image: of `image_size` (height, width) without its own."""
    try:
        npz = zipfile.ZipFile(io.BytesIO(data))
        stored = [name for name in _KINDS if f"{name}.npy" in npz.namelist()]
        arrays = {name: read_array(npz, name, _KINDS[name], MAX_BYTES) for name in stored}
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes reach zipfile's and numpy's parsers in every shape
        raise _fault(f"it cannot be read as an npz: {error}") from error
    if image_size is not None:
        arrays.setdefault("image_size", np.array(image_size, np.int64))
    if missing := [name for name in ("features", "boxes") if name not in arrays]:
        raise _fault(f"no array '{missing[0]}'; it has {', '.join(sorted(arrays)) or 'no known array'}")
    features, boxes = arrays["features"], arrays["boxes"]
    if features.itemsize > 4:
        raise _fault(f"features have dtype {features.dtype}; expected float32 or float16")
    if features.ndim != 2 or not features.shape[1]:
        raise _fault(f"features have shape {features.shape}; expected (regions, features)")
    if not (count := len(features)):
        raise _fault("there is no region")
    shapes = {"boxes": (count, 4), "image_size": (2,), "classes": (count,), "confidences": (count,)}
    for name, array in arrays.items():
        if array.shape != (shape := shapes.get(name, features.shape)):
            raise _fault(f"{name} have shape {array.shape}; expected {shape} for features of {features.shape}")
        if not np.isfinite(array).all():
            raise _fault(f"{name} contain a number that is not finite")

    if "image_size" in arrays:
        height, width = map(int, arrays["image_size"])
    else:
        width, height = math.ceil(boxes[:, 2].max()), math.ceil(boxes[:, 3].max())
    if height <= 0 or width <= 0:
        raise _fault(f"an image of height {height} and width {width}")
    if "classes" in arrays:
        lowest, highest = int(arrays["classes"].min()), int(arrays["classes"].max())
        if not 0 <= lowest <= highest < MOST_CLASSES:
            raise _fault(f"classes from {lowest} to {highest}; expected 0 to 2^31 - 1")

    boxes = boxes.astype(np.float32, copy=False)
    ends = np.array([width, height, width, height], dtype=np.float32)
    faults = {
        "ends before it begins in": (boxes[:, 2:] < boxes[:, :2]).any(axis=1),
        "is outside": ((boxes < -OUTSIDE) | (boxes > ends + OUTSIDE)).any(axis=1),
    }
    for reason, is_bad in faults.items():
        if is_bad.any():
            which = int(is_bad.argmax())
            corners = ", ".join(f"{side:.1f}" for side in boxes[which])
            raise _fault(f"box {which} ({corners}) {reason} an image of {width} x {height}")
    types = {"features": np.float32, "classes": np.int64, "confidences": np.float32}
    optional = {name: arrays[name].astype(kind, copy=False) for name, kind in types.items() if name in arrays}
    return RegionRecord(boxes=np.clip(boxes, 0, ends), image_size=(height, width), **optional)
