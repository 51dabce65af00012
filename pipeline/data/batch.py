"""The contract between data and training: one rank's rows of one global batch.

Shapes: B rows, H x W pixels, P patches, L tokens, R regions, F numbers of a region, K masked tokens, patches or
regions a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of global batch `step`. A member is None where the stage's objectives do not read it.

    Lengths L, R and K, and H and W of pictures that keep their shape, are those of these rows and not of the global
    batch: no result may depend on them.
    """

    step: int
    place: Tensor  # (B,) int64: the row's position in the global batch
    uid: Tensor  # (B,) int64: hash of (source, shard, sample), the same wherever it is read
    image_id: Tensor  # (B,) int64: equal rows show the same image and are never each other's negatives
    source: Tensor  # (B,) int64: the number of the row's source among the stage's, by name
    image: Tensor | None = None  # (B, H, W, 3) uint8
    image_size: Tensor | None = None  # (B, 2) int64: rows and columns of `image` that are picture, if pictures differ
    visible_patches: Tensor | None = None  # (B, K) int64: the patches a model reads, padded with -1, if pictures differ
    second_image: Tensor | None = None  # (B, H, W, 3) uint8: of a statement about two pictures
    second_image_size: Tensor | None = None  # (B, 2) int64
    patch_positions: Tensor | None = None  # (B, K) int64: the masked patches, padded with -1 if pictures differ
    patch_replacements: Tensor | None = None  # (B, K) int64: patch shown in its place, -1: none; None: none anywhere
    text: Tensor | None = None  # (B, L) int64, [CLS] … [SEP], padded with [PAD]
    text_keep: Tensor | None = None  # (B, L) bool: False at padding
    masked_text: Tensor | None = None  # (B, L) int64: `text` with whole words masked
    mask_positions: Tensor | None = None  # (B, K) int64: masked tokens, padded with 0
    mask_labels: Tensor | None = None  # (B, K) int64: the tokens that stood there, padded with -100
    region_features: Tensor | None = None  # (B, R, F) float32
    region_location: Tensor | None = None  # (B, R, 5) float32: see `passes.Regions`
    region_keep: Tensor | None = None  # (B, R) bool: False at padding
    region_class: Tensor | None = None  # (B, R) int64: the detector's most likely class
    region_positions: Tensor | None = None  # (B, K) int64: the masked regions, padded with -1
    region_hidden: Tensor | None = None  # (B, R) bool: the masked regions whose features are zeroed (the others stay)
    label: Tensor | None = None  # (B,) int64: a picture's class; 1 for a true statement, 0 for a false one
    answers: Tensor | None = None  # (B, K) int64: the answers people gave to a question, padded with -1
    answer_scores: Tensor | None = None  # (B, K) float32: each one's soft target

    def __len__(self) -> int:
        return len(self.place)

    def rows(self, which: slice | Tensor) -> Batch:
        """The chosen rows of every member; an index tensor lies on the CPU."""
        if isinstance(which, slice):
            return self._map(lambda tensor: tensor[which])
        return self._map(lambda tensor: tensor[which.to(tensor.device, non_blocking=True)])

    def to(self, device: torch.device) -> Batch:
        """Every member on a device but `place`, which the host reads: fetching it back would make it wait."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, place=self.place)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        changed: dict[str, Any] = {name: change(t) for name, t in tensors.items() if t is not None}
        return replace(self, **changed)
