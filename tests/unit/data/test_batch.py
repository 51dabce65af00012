"""The batch's declared fields: memory layout, collation and hashing all follow from one declaration."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Batch, BatchBuffer, BatchSizes, BatchSpec, batch_field, field_specs
from pipeline.objectives import TEXT, VISUAL

SPEC = BatchSpec(3, frozenset({"image", "text", "masked_text", "masked_patches"}), BatchSizes(6, 5, masked_patches=3))


def test_arrays_do_not_overlap_and_only_requested_groups_have_memory_padded_to_the_size_of_their_field():
    buffer, (arrays, num_bytes) = BatchBuffer(SPEC), SPEC.layout()
    for number, name in enumerate(arrays):
        buffer[name][...] = number
    for number, (name, (shape, dtype, _)) in enumerate(arrays.items()):
        assert (buffer[name].shape, buffer[name].dtype) == (shape, dtype)
        assert (buffer[name] == np.array(number).astype(dtype)).all()
    with pytest.raises(TypeError):
        BatchBuffer(SPEC, np.empty(num_bytes - 64, dtype=np.uint8))
    buffer["text"][...] = 99
    buffer.write("text", 1, np.array([7, 8]), padding=1)
    buffer.write("patch_positions", 1, np.array([2]))
    assert buffer["text"].tolist() == [[99] * 5, [7, 8, 1, 1, 1], [99] * 5]
    assert buffer["patch_positions"][1].tolist() == [2, -1, -1]
    for missing, name in {"image": "image", "masked_text": "masked_text", "masked_patches": "patch_positions"}.items():
        buffer = BatchBuffer(replace(SPEC, groups=SPEC.groups - {missing}))
        assert not any(name in buffer for name, field in field_specs().items() if field.group == missing)
        assert buffer.spec.layout()[1] == len(buffer.memory) < num_bytes
        assert getattr(buffer.to_batch(0, range(3)), name) is None


@dataclass(frozen=True)
class DepthBatch(Batch):
    """A batch with one more field, declared in one line."""

    depth: Tensor | None = batch_field("image", np.float32, ("text", 2), padding=-1, counted_by="text_keep")


def test_new_field_needs_only_its_declaration_and_padding_is_not_hashed():
    buffer = BatchBuffer(replace(SPEC, num_examples=2, batch_type=DepthBatch))
    for row, length in enumerate((2, 4)):
        for name, array in buffer.items():
            if array.ndim > 1 and name != "image":
                buffer.write(name, row, np.ones((min(length, array.shape[1]), *array.shape[2:]), array.dtype))
            else:
                array[row] = row
    batch = buffer.to_batch(7, range(4, 6))
    assert isinstance(batch, DepthBatch)
    assert (batch.depth.shape, batch.text.shape) == ((2, 4, 2), (2, 4)), "cut to the longest text"
    assert batch.depth[0].tolist() == [[1, 1], [1, 1], [-1, -1], [-1, -1]]
    first = batch.rows(slice(0, 1))
    assert isinstance(first, DepthBatch)
    assert torch.equal(first.to(torch.device("cpu")).depth, batch.depth[:1])
    digests = []
    for place, value in (((0, 0, 0), 1), ((0, 2, 0), 5), ((0, 1, 0), 5)):  # unchanged, in the padding, in the example
        (depth := batch.depth.clone())[place] = value
        replace(batch, depth=depth).hash_into(digest := hashlib.sha256())
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_every_field_counts_by_a_field_of_the_same_batch():
    assert {field.counted_by for field in field_specs().values()} <= field_specs().keys() | {None}
    assert TEXT.keys() == {"text", "text_keep"}
    assert VISUAL["visible_patches"] == -1
