"""A restore reads what it needs, once, and only of the version that was verified."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from pipeline.config.errors import CheckpointError
from pipeline.data.storage import ObjectChanged, Storage, join
from pipeline.training.checkpoint import saved_state
from pipeline.training.checkpoint.saved_state import SavedState
from pipeline.training.checkpoint.tensor_file import TensorFile

SIZES = {"a": 10, "b": 70_000, "c": 3, "d": 40_001}
KINDS = ("exp_avg", "exp_avg_sq", "weight")
RANKS = 3


class Counting(Storage):
    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[tuple[str, int]] = Counter()

    def read_range(self, url: str, start: int, stop: int, etag: str | None = None) -> bytes:
        self.asked[url, start] += 1
        return super().read_range(url, start, stop, etag)


def bounds(size: int, rank: int) -> tuple[int, int]:
    return size * rank // RANKS, size * (rank + 1) // RANKS


@pytest.fixture
def whole() -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {(name, kind): torch.randn(size, generator=generator) for name, size in SIZES.items() for kind in KINDS}


@pytest.fixture
def state(tmp_path: Path, whole: dict[tuple[str, str], torch.Tensor]) -> SavedState:
    """The parameters cut among three ranks' files."""
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


def test_any_range_of_any_kind_reads_as_it_was_written(
    state: SavedState, whole: dict[tuple[str, str], torch.Tensor]
) -> None:
    for (name, kind), values in whole.items():
        size = len(values)
        for start, stop in [(0, size), (0, 1), (size - 1, size), (size // 3, size // 2), (2, 2)]:
            assert torch.equal(state.read(name, kind, start, stop), values[start:stop])
    assert state.holds("a", "weight")
    assert not state.holds("a", "ema")


def test_an_engine_s_reading_fetches_hardly_more_than_it_reads(monkeypatch: pytest.MonkeyPatch, request) -> None:
    """Each parameter's own range of each kind, then its whole weight, with a cache far smaller than the files."""
    monkeypatch.setattr(saved_state, "_SMALLEST", 1024)
    monkeypatch.setattr(saved_state, "_MEMORY", 1024 * 3 * 4 * RANKS)
    state: SavedState = request.getfixturevalue("state")
    read = 0
    for name, size in SIZES.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            read += len(state.read(name, kind, *bounds(size, 1)))
        for start in range(0, size, 500):
            read += len(state.read(name, "weight", start, min(start + 500, size)))
    fetched = sum(state._blocks._storage.asked.values()) * 1024
    assert fetched < 1.2 * 4 * read


def test_only_the_version_that_was_verified_is_read(state: SavedState, tmp_path: Path) -> None:
    state._blocks._kept.clear()
    data = (tmp_path / "rank-0").read_bytes()
    Storage().write(str(tmp_path / "rank-0"), data + b"\0")
    with pytest.raises(ObjectChanged, match="rank-0"):
        state.read("a", "weight", 0, 3)


def test_elements_that_no_rank_wrote_are_refused_by_name(state: SavedState) -> None:
    with pytest.raises(CheckpointError, match=r"holds 3 of the 4 elements 0…4 of c \(weight\)"):
        state.read("c", "weight", 0, 4)
