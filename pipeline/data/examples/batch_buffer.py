"""One batch's rows as plain arrays over one piece of memory, wherever that memory lies.

Whoever prepares a row writes it in place: into memory of the trainer's process, or into memory that it shares with
a loader process, in which case nothing is ever copied or pickled on the row's way to the trainer.

Shapes: B rows, S side of the square that holds every picture, L longest text, K masked patches or regions a row,
R regions, F numbers of a region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.questions import MAX_ANSWERS
from pipeline.data.contents.regions import LOCATION

_ALIGNMENT = 64  # bytes, of every array: a cache line
Field = tuple[str, tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True)
class BatchFields:
    """What the rows of a stage hold, decided by its sources' use and its objectives."""

    image: bool
    text: bool
    masked_text: bool
    masked_image: bool
    stand_ins: bool = False  # of masked patches, some of which are shown
    second_image: bool = False
    label: bool = False
    answers: bool = False
    regions: bool = False
    region_class: bool = False
    masked_regions: bool = False

    @staticmethod
    def of(config: RunConfig, stage: StageConfig) -> BatchFields:
        source_type, objectives = config.source_type_of(stage), stage.objectives
        both = not objectives.keys().isdisjoint({"itc", "itm", "wpa", "ranking", "vqa", "nlvr2"})
        masked_text, masked_image = "mlm" in objectives, "mim" in objectives
        fused = masked_text and source_type == "pairs"  # masked words of a pair are read beside its picture
        described = (
            masked_image and source_type == "pairs" and config.model.kind == "vilt"
        )  # and patches beside its text
        return BatchFields(
            image=(both and source_type != "regions") or fused or masked_image or "classification" in objectives,
            text=both or masked_text or described or source_type == "regions",
            masked_text=masked_text,
            masked_image=masked_image,
            stand_ins=masked_image and stage.masking.mask_token_prob < 1,
            second_image="nlvr2" in objectives,
            label="classification" in objectives or "nlvr2" in objectives,
            answers="vqa" in objectives,
            regions=source_type == "regions",
            region_class="moc" in objectives,
            masked_regions="moc" in objectives or "mrfr" in objectives,
        )


@dataclass(frozen=True)
class RegionSizes:
    """How much a row holds of a detector's regions: at most so many, of so many numbers, so many of them masked."""

    most: int
    numbers: int
    masked: int


@dataclass(frozen=True)
class BatchSpec:
    """Which arrays `rows` rows need, and where each lies in `bytes` bytes of memory."""

    rows: int
    fields: tuple[Field, ...]

    @staticmethod
    def of(
        wants: BatchFields,
        rows: int,
        image_size: int,
        max_text_length: int,
        masked_patches: int,
        regions: RegionSizes | None = None,
        max_visible_patches: int = 0,
    ) -> BatchSpec:
        """`max_visible_patches` is the most patches a row has, where pictures keep their shape; 0: they are square."""
        integer, byte = np.dtype(np.int64), np.dtype(np.uint8)
        fields: list[Field] = [(name, (rows,), integer) for name in ("uid", "image_id", "source")]
        if wants.image:
            fields.append(("image", (rows, image_size, image_size, 3), byte))
        if wants.second_image:
            fields.append(("second_image", (rows, image_size, image_size, 3), byte))
        if max_visible_patches:
            fields += [(f"{name}_size", (rows, 2), integer) for name, *_ in fields if name.endswith("image")]
        if max_visible_patches and not wants.second_image:  # of two pictures all patches are read
            fields.append(("visible_patches", (rows, max_visible_patches), integer))
        if wants.label:
            fields.append(("label", (rows,), integer))
        if wants.answers:
            fields += [("answers", (rows, MAX_ANSWERS), integer)]
            fields += [("answer_scores", (rows, MAX_ANSWERS), np.dtype(np.float32))]
        if wants.text:
            fields += [("text_length", (rows,), integer), ("text", (rows, max_text_length), integer)]
        if wants.masked_text:
            fields.append(("num_masked", (rows,), integer))
            fields += [
                (name, (rows, max_text_length), integer) for name in ("masked_text", "mask_positions", "mask_labels")
            ]
        if wants.masked_image:
            fields.append(("patch_positions", (rows, masked_patches), integer))
        if wants.stand_ins:
            fields.append(("patch_replacements", (rows, masked_patches), integer))
        if regions is not None:
            fields += _region_fields(wants, rows, regions)
        return BatchSpec(rows, tuple(fields))

    @property
    def bytes(self) -> int:
        return sum(_aligned(shape, kind) for _, shape, kind in self.fields)


class BatchBuffer:
    """The arrays of a layout over `memory` (anything with the buffer protocol), by name.

    `source` numbers the plan's sources; a text is `text_length` tokens and padding, and of the masked places the
    first `num_masked` are real. Pictures that keep their shape lie at the top left, and patches behind -1 are none. Of
    the regions the first `num_regions` are real, of the masked ones those above -1.
    """

    def __init__(self, layout: BatchSpec, memory: Any):
        self.layout, self.memory = layout, memory
        self._arrays: dict[str, np.ndarray] = {}
        offset = 0
        for name, shape, kind in layout.fields:
            self._arrays[name] = np.ndarray(shape, kind, memory, offset)
            offset += _aligned(shape, kind)

    @staticmethod
    def allocate(layout: BatchSpec) -> BatchBuffer:
        return BatchBuffer(layout, np.empty(layout.bytes, dtype=np.uint8))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def write(self, name: str, row: int, values: np.ndarray, fill: float) -> None:
        """Sets one row of (B, L), filled up with `fill`."""
        array = self._arrays[name]
        array[row, : len(values)] = values
        array[row, len(values) :] = fill

    def copy(self) -> BatchBuffer:
        """The same rows in memory of their own."""
        other = BatchBuffer.allocate(self.layout)
        for name, array in self._arrays.items():
            other[name][...] = array
        return other

    def copy_rows(self, rows: range, source: BatchBuffer) -> None:
        """Takes all rows of a smaller buffer, as `rows` of this one."""
        for name, array in self._arrays.items():
            array[rows.start : rows.stop] = source[name]


def _region_fields(wants: BatchFields, rows: int, sizes: RegionSizes) -> list[Field]:
    integer, number = np.dtype(np.int64), np.dtype(np.float32)
    fields: list[Field] = [
        ("num_regions", (rows,), integer),
        ("mrfr", (rows, sizes.most, sizes.numbers), number),
        ("region_location", (rows, sizes.most, LOCATION), number),
    ]
    if wants.region_class:
        fields.append(("moc", (rows, sizes.most), integer))
    if wants.masked_regions:
        fields.append(("region_positions", (rows, sizes.masked), integer))
        fields.append(("region_hidden", (rows, sizes.most), np.dtype(np.bool_)))
    return fields


def _aligned(shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
    return -(-math.prod(shape) * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
