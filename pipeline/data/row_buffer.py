"""One batch's rows as plain arrays over one piece of memory, wherever that memory lies.

Whoever prepares a row writes it in place: into memory of the trainer's process, or into memory that it shares with
a loader process, in which case nothing is ever copied or pickled on the row's way to the trainer.

Shapes: B rows, S image side, L longest text, K masked patches a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.schema import RunConfig, StageConfig

_ALIGNMENT = 64  # bytes, of every array: a cache line
Field = tuple[str, tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True)
class Wants:
    """What the rows of a stage hold, decided by its sources' use and its objectives."""

    image: bool
    text: bool
    masked_text: bool
    masked_image: bool

    @staticmethod
    def of(config: RunConfig, stage: StageConfig) -> Wants:
        use, objectives = config.use_of(stage), stage.objectives
        both = "contrastive" in objectives or "matching" in objectives
        masked_text, masked_image = "masked_language" in objectives, "masked_image" in objectives
        fused = masked_text and use == "pairs"  # masked words of a pair are read beside its picture
        return Wants(
            image=both or fused or masked_image,
            text=both or masked_text,
            masked_text=masked_text,
            masked_image=masked_image,
        )


@dataclass(frozen=True)
class RowLayout:
    """Which arrays `rows` rows need, and where each lies in `bytes` bytes of memory."""

    rows: int
    fields: tuple[Field, ...]

    @staticmethod
    def of(wants: Wants, rows: int, image_size: int, max_text: int, masked_patches: int) -> RowLayout:
        integer, byte = np.dtype(np.int64), np.dtype(np.uint8)
        fields: list[Field] = [(name, (rows,), integer) for name in ("uid", "image_id", "source")]
        if wants.image:
            fields.append(("image", (rows, image_size, image_size, 3), byte))
        if wants.text:
            fields += [("text_length", (rows,), integer), ("text", (rows, max_text), integer)]
        if wants.masked_text:
            fields.append(("num_masked", (rows,), integer))
            fields += [(name, (rows, max_text), integer) for name in ("masked_text", "mask_positions", "mask_labels")]
        if wants.masked_image:
            fields.append(("patch_positions", (rows, masked_patches), integer))
        return RowLayout(rows, tuple(fields))

    @property
    def bytes(self) -> int:
        return sum(_aligned(shape, kind) for _, shape, kind in self.fields)


class RowBuffer:
    """The arrays of a layout over `memory` (anything with the buffer protocol), by name.

    `source` numbers the plan's sources; a text is `text_length` tokens and padding, and of the masked places the
    first `num_masked` are real.
    """

    def __init__(self, layout: RowLayout, memory: Any):
        self.layout, self.memory = layout, memory
        self._arrays: dict[str, np.ndarray] = {}
        offset = 0
        for name, shape, kind in layout.fields:
            self._arrays[name] = np.ndarray(shape, kind, memory, offset)
            offset += _aligned(shape, kind)

    @staticmethod
    def allocate(layout: RowLayout) -> RowBuffer:
        return RowBuffer(layout, np.empty(layout.bytes, dtype=np.uint8))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def write(self, name: str, row: int, values: np.ndarray, fill: int) -> None:
        """Sets one row of (B, L), filled up with `fill`."""
        array = self._arrays[name]
        array[row, : len(values)] = values
        array[row, len(values) :] = fill

    def copy(self) -> RowBuffer:
        """The same rows in memory of their own."""
        other = RowBuffer.allocate(self.layout)
        for name, array in self._arrays.items():
            other[name][...] = array
        return other

    def copy_rows(self, rows: range, source: RowBuffer) -> None:
        """Takes all rows of a smaller buffer, as `rows` of this one."""
        for name, array in self._arrays.items():
            array[rows.start : rows.stop] = source[name]


def _aligned(shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
    return -(-math.prod(shape) * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
