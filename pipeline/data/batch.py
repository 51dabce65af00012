"""The contract between data and training: one rank's rows of one global batch.

Shapes: B rows, H x W pixels, P patches, L tokens, K masked tokens or patches a row.
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

    Lengths L and K are those of these rows, not of the global batch: no result may depend on them.
    """

    step: int
    place: Tensor  # (B,) int64: the row's position in the global batch
    uid: Tensor  # (B,) int64: hash of (source, shard, sample), the same wherever it is read
    image_id: Tensor  # (B,) int64: equal rows show the same image and are never each other's negatives
    image: Tensor | None = None  # (B, H, W, 3) uint8
    patch_positions: Tensor | None = None  # (B, K) int64: the masked patches, K equal in all rows
    text: Tensor | None = None  # (B, L) int64, [CLS] … [SEP], padded with [PAD]
    text_keep: Tensor | None = None  # (B, L) bool: False at padding
    masked_text: Tensor | None = None  # (B, L) int64: `text` with whole words masked
    mask_positions: Tensor | None = None  # (B, K) int64: masked tokens, padded with 0
    mask_labels: Tensor | None = None  # (B, K) int64: the tokens that stood there, padded with -100

    def __len__(self) -> int:
        return len(self.place)

    def rows(self, which: slice | Tensor) -> Batch:
        """The chosen rows of every member."""
        return self._map(lambda tensor: tensor[which])

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        changed: dict[str, Any] = {name: change(t) for name, t in tensors.items() if t is not None}
        return replace(self, **changed)
