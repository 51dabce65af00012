"""The batch's declared fields: memory layout, collation and hashing all follow from one declaration."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.batch import FIELDS, BatchBuffer, BatchSizes, BatchSpec
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
        assert not any(name in buffer for name, field in FIELDS.items() if field.group == missing)
        assert buffer.spec.layout()[1] == len(buffer.memory) < num_bytes
        assert getattr(buffer.to_batch(0, range(3)), name) is None


def test_fields_are_cut_to_the_longest_example_and_padding_is_not_hashed():
    sizes = replace(SPEC.sizes, regions=6, region_features=2)
    buffer = BatchBuffer(BatchSpec(2, SPEC.groups | {"regions"}, sizes))
    for row, length in enumerate((2, 4)):
        for name, array in buffer.items():
            if array.ndim > 1 and name != "image":
                buffer.write(name, row, np.ones((min(length, array.shape[1]), *array.shape[2:]), array.dtype))
            else:
                array[row] = row
    batch = buffer.to_batch(7, range(4, 6))
    assert (batch.region_features.shape, batch.text.shape) == ((2, 4, 2), (2, 4))
    assert batch.region_features[0].tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    first = batch.rows(slice(0, 1)).to(torch.device("cpu"))
    assert torch.equal(first.region_features, batch.region_features[:1])
    digests = []
    for place, value in (((0, 0, 0), 1), ((0, 2, 0), 5), ((0, 1, 0), 5)):  # unchanged, in the padding, in the example
        (features := batch.region_features.clone())[place] = value
        replace(batch, region_features=features).hash_into(digest := hashlib.sha256())
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1] != digests[2]
    assert {field.counted_by for field in FIELDS.values()} <= FIELDS.keys() | {None}
    assert TEXT.keys() == {"text", "text_keep"}
    assert VISUAL["visible_patches"] == -1
