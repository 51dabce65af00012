"""Checkpoint files: readable by safetensors, written in parts, and restored by range with few requests."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.config.errors import CheckpointError
from pipeline.data.storage import ObjectChanged, Storage, join
from pipeline.training.checkpoint import serialization
from pipeline.training.checkpoint.serialization import DTYPES, SavedState, TensorFile

SIZES = {"a": 10, "b": 70_000, "c": 3, "d": 40_001}
KINDS = ("exp_avg", "exp_avg_sq", "weight")
RANKS = 3


class Counting(Storage):
    def __init__(self) -> None:
        super().__init__()
        self.requests: Counter[tuple[str, int]] = Counter()

    def read_range(self, url: str, start: int, stop: int, etag: str | None = None) -> bytes:
        self.requests[url, start] += 1
        return super().read_range(url, start, stop, etag)


def bounds(size: int, rank: int) -> tuple[int, int]:
    return size * rank // RANKS, size * (rank + 1) // RANKS


@pytest.fixture
def whole() -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {(name, kind): torch.randn(size, generator=generator) for name, size in SIZES.items() for kind in KINDS}


@pytest.fixture
def state(tmp_path: Path, whole: dict[tuple[str, str], torch.Tensor]) -> SavedState:
    """Return parameters split across three ranks' files."""
    storage, files = Counting(), {}
    for rank in range(RANKS):
        parts = {}
        for kind in KINDS:
            for name, size in SIZES.items():
                start, stop = bounds(size, rank)
                parts[f"{name}|{start}|{kind}"] = whole[name, kind][start:stop]
        file = TensorFile(parts)
        storage.write(join(str(tmp_path), f"rank-{rank}"), file.read(0, file.size))
        files[f"rank-{rank}"] = storage.info(join(str(tmp_path), f"rank-{rank}"))
    return SavedState(storage, str(tmp_path), files, optimizer_step=7)


def test_any_range_of_any_kind_round_trips(state: SavedState, whole: dict[tuple[str, str], torch.Tensor]) -> None:
    for (name, kind), values in whole.items():
        size = len(values)
        for start, stop in [(0, size), (0, 1), (size - 1, size), (size // 3, size // 2), (2, 2)]:
            assert torch.equal(state.read(name, kind, start, stop), values[start:stop])
    assert (state.holds("a", "weight"), state.holds("a", "ema")) == (True, False)
    with pytest.raises(CheckpointError, match=r"holds 3 of the 4 elements 0…4 of c \(weight\)"):
        state.read("c", "weight", 0, 4)


def test_engine_access_pattern_fetches_little_more_than_it_reads(monkeypatch: pytest.MonkeyPatch, request) -> None:
    """Each parameter's own range of each kind, then its whole weight, with a cache far smaller than the files."""
    monkeypatch.setattr(serialization, "_MIN_BLOCK", 1024)
    monkeypatch.setattr(serialization, "_CACHE_BYTES", 1024 * 3 * 4 * RANKS)
    state: SavedState = request.getfixturevalue("state")
    read = 0
    for name, size in SIZES.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            read += len(state.read(name, kind, *bounds(size, 1)))
        for start in range(0, size, 500):
            read += len(state.read(name, "weight", start, min(start + 500, size)))
    fetched = sum(state._storage.requests.values()) * 1024
    assert fetched < 1.2 * 4 * read


def test_changed_file_is_rejected(state: SavedState, tmp_path: Path) -> None:
    state._blocks.clear()
    data = (tmp_path / "rank-0").read_bytes()
    Storage().write(str(tmp_path / "rank-0"), data + b"\0")
    with pytest.raises(ObjectChanged, match="rank-0"):
        state.read("a", "weight", 0, 3)


TENSORS = {
    "a|0|weight": torch.arange(1000.0),
    "half": torch.randn(3, 5).bfloat16(),
    "transposed": torch.arange(12).reshape(3, 4).T,
    "none": torch.empty(0),
    "one": torch.tensor(3.0),
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in DTYPES},
}


def test_safetensors_reads_the_file_and_its_ranges() -> None:
    for tensors in (TENSORS, {}):
        file = TensorFile(tensors)
        whole = file.read(0, file.size)
        read = safetensors.torch.load(whole)
        assert set(read) == set(tensors)
        assert all(
            torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items()
        )
        assert file.record() == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
        for start in range(0, file.size, 97):
            for length in (1, 8, 500, file.size):
                assert file.read(start, min(start + length, file.size)) == whole[start : start + length]
