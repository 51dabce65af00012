"""The batch's declared fields: memory layout, collation and hashing all follow from one declaration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Batch, BatchBuffer, BatchSizes, BatchSpec, batch_field, field_specs, swapped_fields

SIZES = BatchSizes(image_side=6, text=5, masked_patches=3)
GROUPS = frozenset({"image", "text", "masked_text", "masked_patches"})


def spec(num_examples: int, groups: frozenset[str] = GROUPS) -> BatchSpec:
    return BatchSpec(num_examples, groups, SIZES)


def test_arrays_do_not_overlap_and_fit_the_memory():
    buffer = BatchBuffer(spec(3))
    for number, (name, _, _) in enumerate(spec(3).fields):
        buffer[name][...] = number
    for number, (name, shape, dtype) in enumerate(spec(3).fields):
        assert buffer[name].shape == shape
        assert buffer[name].dtype == dtype
        assert (buffer[name] == np.array(number).astype(dtype)).all()
    with pytest.raises(TypeError):
        BatchBuffer(spec(3), np.empty(spec(3).bytes - 64, dtype=np.uint8))


def test_only_requested_groups_have_memory():
    for missing in ("image", "masked_text", "masked_patches"):
        buffer = BatchBuffer(spec(2, GROUPS - {missing}))
        assert not any(name in buffer for name, field in field_specs().items() if field.group == missing)
        assert buffer.spec.bytes < spec(2).bytes
        name = "patch_positions" if missing == "masked_patches" else missing
        assert getattr(buffer.to_batch(0, range(2)), name) is None


def test_written_examples_are_padded_and_copied_parts_equal_the_whole():
    buffer = BatchBuffer(spec(2))
    buffer["text"][...] = 99
    buffer.write("text", 1, np.array([7, 8]), padding=1)
    buffer.write("patch_positions", 1, np.array([2]))
    assert buffer["text"].tolist() == [[99] * 5, [7, 8, 1, 1, 1]]
    assert buffer["patch_positions"][1].tolist() == [2, -1, -1]
    whole, joined, random = BatchBuffer(spec(5)), BatchBuffer(spec(5)), np.random.default_rng(0)
    for name, shape, _ in spec(5).fields:
        whole[name][...] = random.integers(0, 200, shape)
    for rows in (range(0, 2), range(2, 5)):
        part = BatchBuffer(spec(len(rows)))
        for name, _, _ in spec(5).fields:
            part[name][...] = whole[name][rows.start : rows.stop]
        joined.copy_rows(rows, part)
    for name, _, _ in spec(5).fields:
        assert np.array_equal(joined[name], whole[name])
        assert not np.shares_memory(joined[name], whole[name])


@dataclass(frozen=True)
class DepthBatch(Batch):
    """A batch with one more field, declared in one line."""

    depth: Tensor | None = batch_field("image", np.float32, ("text", 2), padding=-1, counted_by="text_keep")


def test_new_field_needs_only_its_declaration():
    buffer = BatchBuffer(replace(spec(2), batch_type=DepthBatch))
    for row, length in enumerate((2, 4)):
        for name, shape, dtype in buffer.spec.fields:
            if len(shape) > 1 and name != "image":
                buffer.write(name, row, np.ones((min(length, shape[1]), *shape[2:]), dtype))
            else:
                buffer[name][row] = row
    batch = buffer.to_batch(7, range(4, 6))
    assert isinstance(batch, DepthBatch)
    assert batch.depth is not None
    assert batch.text is not None
    assert batch.depth.shape == (2, 4, 2), "cut to the longest text"
    assert batch.text.shape == (2, 4)
    assert batch.depth[0].tolist() == [[1, 1], [1, 1], [-1, -1], [-1, -1]]
    first = batch.rows(slice(0, 1))
    assert isinstance(first, DepthBatch)
    assert torch.equal(first.to(torch.device("cpu")).depth, batch.depth[:1])

    def digest(batch: Batch) -> str:
        value = hashlib.sha256()
        batch.hash_into(value)
        return value.hexdigest()

    changed, padding = batch.depth.clone(), batch.depth.clone()
    changed[0, 1, 0], padding[0, 2, 0] = 5, 5
    assert digest(replace(batch, depth=changed)) != digest(batch)
    assert digest(replace(batch, depth=padding)) == digest(batch), "padding is not hashed"


def test_every_field_counts_by_a_field_of_the_same_batch():
    specs = field_specs()
    for name, field in specs.items():
        assert field.counted_by is None or field.counted_by in specs, name
    assert set(swapped_fields("language")) == {"text", "text_keep"}
    assert swapped_fields("vision")["visible_patches"] == -1
