"""One rank's examples of one global batch. To add a field, declare it in `Batch` and write its values.

Shapes: B examples, H x W pixels, S side of the square that holds every image, P patches, L tokens, R regions, F
features of a region, K masked tokens, patches or regions of an example.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.data.contents.members import MAX_ANSWERS
from pipeline.data.contents.regions import LOCATION

IGNORED = -100  # the label of a padded masked position
_ALIGNMENT = 64  # bytes, of every array: a cache line

Modality = Literal["vision", "language"]


@dataclass(frozen=True)
class BatchSizes:
    """Maximum sizes of one example; a size that no field of a batch uses may stay 0."""

    image_side: int = 0  # pixels of the square that holds every image
    text: int = 0  # tokens
    visible_patches: int = 0
    masked_patches: int = 0
    regions: int = 0
    region_features: int = 0
    masked_regions: int = 0


# Shapes of one example: names of `BatchSizes`, or numbers.
_PIXELS, _VISIBLE, _MASKED = ("image_side", "image_side", 3), ("visible_patches",), ("masked_patches",)
_TEXT, _REGIONS, _CHOSEN = ("text",), ("regions",), ("masked_regions",)
_FEATURES, _LOCATION = ("regions", "region_features"), ("regions", LOCATION)


@dataclass(frozen=True)
class FieldSpec:
    """Storage of a batch field, cut to the longest example of a batch; only the real part enters fingerprints. `group`
    is what a stage requests (None: part of every batch). `counted_by` names the field whose values give an example's
    length, as the number of values that are not padding, or directly where that field's padding is None. Fields of one
    `modality` move together when an example gets another example's image or text as a negative.
    """

    group: str | None
    dtype: type[np.generic]
    shape: tuple[str | int, ...] = ()
    padding: float | None = 0
    counted_by: str | None = None
    modality: Modality | None = None
    is_hashed: bool = True  # in fingerprints


def batch_field(*arguments: Any, **options: Any) -> Any:
    """Declare an optional field of a batch; the arguments are those of `FieldSpec`."""
    return dataclasses.field(default=None, metadata={"spec": FieldSpec(*arguments, **options)})


# The numbers of every example; fingerprints hash what is needed of them apart from the other fields.
_IDENTITY = {"spec": FieldSpec(None, np.int64, is_hashed=False)}


@dataclass(frozen=True)
class Batch:
    """Examples of global batch `step`. A field is None where the stage's objectives do not read it. The lengths H, W,
    L, R and K are those of these examples, not of the global batch: no result may depend on them.
    """

    step: int
    place: Tensor  # (B,) int64: the example's position in the global batch
    # (B,): hash of (source, shard, sample), the same for every reader
    uid: Tensor = dataclasses.field(metadata=_IDENTITY)
    # (B,): examples with equal ids show one image and are never each other's negatives
    image_id: Tensor = dataclasses.field(metadata=_IDENTITY)
    # (B,): the index of the example's source among the stage's, sorted by name
    source: Tensor = dataclasses.field(metadata=_IDENTITY)

    # (B, H, W, 3) images, and (B, 2) their rows and columns where images of a batch differ in size.
    image: Tensor | None = batch_field("image", np.uint8, _PIXELS, 0, "image_size", "vision")
    image_size: Tensor | None = batch_field("image_size", np.int64, (2,), None, modality="vision", is_hashed=False)
    # The second image of a statement about two.
    second_image: Tensor | None = batch_field("second_image", np.uint8, _PIXELS, 0, "second_image_size")
    second_image_size: Tensor | None = batch_field("second_image_size", np.int64, (2,), None, is_hashed=False)
    # (B, P): the patches that a model reads, if images differ in size.
    visible_patches: Tensor | None = batch_field("visible_patches", np.int64, _VISIBLE, -1, "visible_patches", "vision")
    # (B, K): the masked patches, and the patch that is shown in the place of each (-1: the mask embedding).
    patch_positions: Tensor | None = batch_field("masked_patches", np.int64, _MASKED, -1, "patch_positions")
    patch_replacements: Tensor | None = batch_field("patch_replacements", np.int64, _MASKED, -1, "patch_positions")
    label: Tensor | None = batch_field("label", np.int64)  # (B,): an image's class; 1 for a true statement, else 0
    # (B, K): the answers given to a question, and the soft target of each.
    answers: Tensor | None = batch_field("answers", np.int64, (MAX_ANSWERS,), -1)
    answer_scores: Tensor | None = batch_field("answers", np.float32, (MAX_ANSWERS,))
    # (B, L): [CLS] … [SEP], padded with [PAD]; `text_keep` is False at padding.
    text: Tensor | None = batch_field("text", np.int64, _TEXT, 0, "text_keep", "language")
    text_keep: Tensor | None = batch_field("text", np.bool_, _TEXT, 0, "text_keep", "language", is_hashed=False)
    # (B, L) `text` with whole words masked; (B, K) the masked tokens' positions and original ids.
    masked_text: Tensor | None = batch_field("masked_text", np.int64, _TEXT, 0, "text_keep")
    mask_positions: Tensor | None = batch_field("masked_text", np.int64, _TEXT, 0, "mask_labels")
    mask_labels: Tensor | None = batch_field("masked_text", np.int64, _TEXT, IGNORED, "mask_labels")
    # (B, R, F) and (B, R, 5): a detector's regions (see `models.forward.Regions`); `region_keep` is False at padding.
    region_features: Tensor | None = batch_field("regions", np.float32, _FEATURES, 0, "region_keep", "vision")
    region_location: Tensor | None = batch_field("regions", np.float32, _LOCATION, 0, "region_keep", "vision")
    region_keep: Tensor | None = batch_field("regions", np.bool_, _REGIONS, 0, "region_keep", "vision", is_hashed=False)
    # (B, R) the detector's most likely class; (B, R) whether a region's features are zeroed; (B, K) masked regions.
    region_class: Tensor | None = batch_field("region_class", np.int64, _REGIONS, 0, "region_keep")
    region_hidden: Tensor | None = batch_field("masked_regions", np.bool_, _REGIONS, 0, "region_keep")
    region_positions: Tensor | None = batch_field("masked_regions", np.int64, _CHOSEN, -1, "region_positions")

    def __len__(self) -> int:
        return len(self.place)

    def rows(self, which: slice | Tensor) -> Batch:
        """Return the chosen examples of every field; an index tensor is on the CPU."""
        rows: dict[str, Any] = {}
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                index = which if isinstance(which, slice) else which.to(tensor.device, non_blocking=True)
                rows[name] = tensor[index]
        return replace(self, **rows)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, except `place`: the host reads it, and fetching it back would synchronise."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "place"}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Feed every example to a hash, without its padding, so that the result does not depend on the world size."""
        hashed = [name for name, spec in FIELDS.items() if spec.is_hashed and getattr(self, name) is not None]
        for row in range(len(self)):
            digest.update(np.array([self.step, self.place[row], self.uid[row], self.image_id[row]]).tobytes())
            for name in hashed:
                values, counter = getattr(self, name)[row], FIELDS[name].counted_by
                if counter is not None and (counts := getattr(self, counter)) is not None:
                    padding = FIELDS[counter].padding
                    real = counts[row] if padding is None else [(counts[row] != padding).sum()]
                    values = values[tuple(slice(int(length)) for length in real)]
                digest.update(f"{name}{tuple(values.shape)}".encode())
                digest.update(values.contiguous().numpy().tobytes())


# The declared fields of a batch by name, in order.
FIELDS: dict[str, FieldSpec] = {f.name: f.metadata["spec"] for f in dataclasses.fields(Batch) if "spec" in f.metadata}


@dataclass(frozen=True)
class BatchSpec:
    """The arrays of `num_examples` examples of some field groups, and their place in one block of memory."""

    num_examples: int
    groups: frozenset[str]
    sizes: BatchSizes

    def layout(self) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype[Any], int]], int]:
        """Return shape, type and offset of every array by field name, and the bytes of all."""
        sizes: dict[Any, Any] = dataclasses.asdict(self.sizes)
        arrays, offset = {}, 0
        for name, spec in FIELDS.items():
            if spec.group is None or spec.group in self.groups:
                shape = (self.num_examples, *(sizes.get(axis, axis) for axis in spec.shape))
                arrays[name] = shape, np.dtype(spec.dtype), offset
                offset += -(-math.prod(shape) * np.dtype(spec.dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        return arrays, offset


class BatchBuffer(dict[str, np.ndarray]):
    """Arrays of a spec by field name, over `memory` (any buffer; default: new), which processes may share."""

    def __init__(self, spec: BatchSpec, memory: Any = None):
        super().__init__()
        arrays, num_bytes = spec.layout()
        self.spec, self.memory = spec, np.empty(num_bytes, dtype=np.uint8) if memory is None else memory
        for name, (shape, dtype, offset) in arrays.items():
            self[name] = np.ndarray(shape, dtype, self.memory, offset)

    def write(self, name: str, row: int, values: np.ndarray, padding: float | None = None) -> None:
        """Set one example of a field, padded to its size with `padding` (default: the field's own)."""
        array = self[name]
        array[row, : len(values)] = values
        array[row, len(values) :] = FIELDS[name].padding if padding is None else padding

    def to_batch(self, step: int, places: range) -> Batch:
        """Return the examples as tensors over the same memory, every axis cut to the longest example."""
        tensors = {}
        for name, array in self.items():
            counter = FIELDS[name].counted_by
            if counter is not None and counter in self:
                counts, padding = self[counter], FIELDS[counter].padding
                longest = counts.max(axis=0) if padding is None else [(counts != padding).sum(1).max()]
                array = array[(slice(None), *(slice(int(length)) for length in longest))]
            tensors[name] = torch.from_numpy(array)
        return Batch(step=step, place=torch.arange(places.start, places.stop), **tensors)
