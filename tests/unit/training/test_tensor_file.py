"""A safetensors file given out by ranges is the file that the library reads."""

from __future__ import annotations

import hashlib

import pytest
import safetensors.torch
import torch

from pipeline.training.checkpoint.tensor_file import DTYPES, TensorFile

TENSORS = {
    "a|0|weight": torch.arange(1000.0),
    "half": torch.randn(3, 5).bfloat16(),
    "transposed": torch.arange(12).reshape(3, 4).T,
    "none": torch.empty(0),
    "one": torch.tensor(3.0),
    "flags": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("tensors", [TENSORS, {}], ids=["several", "none"])
def test_the_library_reads_what_was_given_out(tensors: dict[str, torch.Tensor]) -> None:
    file = TensorFile(tensors)
    read = safetensors.torch.load(file.read(0, file.size))
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_every_range_is_that_of_the_whole() -> None:
    file = TensorFile(TENSORS)
    whole = file.read(0, file.size)
    assert len(whole) == file.size
    for start in range(0, file.size, 97):
        for length in (1, 8, 500, file.size):
            assert file.read(start, min(start + length, file.size)) == whole[start : start + length]


def test_the_record_is_of_the_whole_file() -> None:
    file = TensorFile(TENSORS)
    whole = file.read(0, file.size)
    assert file.record() == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_of_types_are_the_librarys(dtype: torch.dtype) -> None:
    file = TensorFile({"x": torch.ones(3, dtype=dtype)})
    assert safetensors.torch.load(file.read(0, file.size))["x"].dtype == dtype
