"""Rows with another row's picture or text: what matching reads as negatives, wherever in the global batch they lie.

Only what is asked for travels between ranks, pictures as bytes. Ranks' pictures and texts may be padded to different
sizes; they are padded alike before they travel.

Shapes: n rows of this rank (of those that an objective reads), B global batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import Batch, swapped_fields
from pipeline.training.collectives import Collectives

# Fields that move together, and what they are padded with.
VISUAL, TEXT = swapped_fields("vision"), swapped_fields("language")


@dataclass(frozen=True)
class Exchange:
    """For each row the place of the row in the global batch whose `members` it gets, or -1 for its own."""

    members: dict[str, float]
    places: Tensor  # (n,) int64


def exchanged(collectives: Collectives, batch: Batch, size: int, rows: Tensor, exchanges: list[Exchange]) -> Batch:
    """The chosen `rows` (n,) of this rank's `batch`, their members exchanged. All ranks call it together.

    `size` is the global batch's.
    """
    result = batch.rows(rows)
    for exchange in exchanges:
        wanted = torch.full((len(batch),), -1, dtype=torch.int64)
        wanted[rows] = exchange.places.cpu()
        fetch = collectives.fetcher(wanted, size)
        replaced = torch.nonzero(wanted[rows] >= 0).flatten()
        for name, fill in exchange.members.items():
            own = getattr(batch, name)
            if own is None:
                continue
            own = _padded(collectives, own, fill)
            mine = own[rows.to(own.device)]
            mine[replaced.to(own.device)] = fetch(own)
            changed: dict[str, Any] = {name: mine}
            result = replace(result, **changed)
    return result


def _padded(collectives: Collectives, rows: Tensor, fill: float) -> Tensor:
    """The rows as large as the largest rank's: only the outermost dimensions may differ."""
    sizes = collectives.largest(list(rows.shape[1:]))
    padding = [amount for size, own in zip(sizes, rows.shape[1:], strict=True) for amount in (size - own, 0)][::-1]
    return F.pad(rows, padding, value=fill) if any(padding) else rows
