from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.examples.batch_buffer import BatchBuffer, BatchFields, BatchSpec

ALL = BatchFields(image=True, text=True, masked_text=True, masked_image=True)


def layout(rows: int, wants: BatchFields = ALL) -> BatchSpec:
    return BatchSpec.of(wants, rows, image_size=6, max_text_length=5, masked_patches=3)


def test_arrays_share_no_byte_and_fill_no_more_than_the_layout_says():
    buffer = BatchBuffer.allocate(layout(3))
    for number, (name, _, _) in enumerate(layout(3).fields):
        buffer[name][...] = number
    for number, (name, shape, kind) in enumerate(layout(3).fields):
        assert buffer[name].shape == shape
        assert buffer[name].dtype == kind
        assert (buffer[name] == number).all()
    with pytest.raises(TypeError):
        BatchBuffer(layout(3), np.empty(layout(3).bytes - 64, dtype=np.uint8))


@pytest.mark.parametrize(
    ("wants", "absent"),
    [
        (BatchFields(image=False, text=True, masked_text=True, masked_image=False), {"image", "patch_positions"}),
        (
            BatchFields(image=True, text=False, masked_text=False, masked_image=True),
            {"text", "masked_text", "mask_labels"},
        ),
    ],
)
def test_only_what_the_stage_reads_has_memory(wants: BatchFields, absent: set[str]):
    buffer = BatchBuffer.allocate(layout(2, wants))
    assert not any(name in buffer for name in absent)
    assert layout(2, wants).bytes < layout(2).bytes


def test_a_written_row_is_filled_up():
    buffer = BatchBuffer.allocate(layout(2))
    buffer["text"][...] = 99
    buffer.write("text", 1, np.array([7, 8]), fill=0)
    assert buffer["text"].tolist() == [[99] * 5, [7, 8, 0, 0, 0]]


def test_parts_put_together_are_the_whole():
    whole, joined = BatchBuffer.allocate(layout(5)), BatchBuffer.allocate(layout(5))
    random = np.random.default_rng(0)
    for name, shape, _ in layout(5).fields:
        whole[name][...] = random.integers(0, 200, shape)
    for rows in (range(0, 2), range(2, 5)):
        part = BatchBuffer.allocate(layout(len(rows)))
        for name, _, _ in layout(5).fields:
            part[name][...] = whole[name][rows.start : rows.stop]
        joined.copy_rows(rows, part)
    copied = whole.copy()
    whole_values = {name: whole[name].copy() for name, _, _ in layout(5).fields}
    for name in whole_values:
        whole[name][...] = 0
        assert np.array_equal(joined[name], whole_values[name])
        assert np.array_equal(copied[name], whole_values[name])
