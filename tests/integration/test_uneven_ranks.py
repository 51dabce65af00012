"""Collectives of ranks with unequal, possibly empty, parts of a global batch."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.training.collectives import Collectives, share
from tests.support.ranks import run_ranks

BATCHES = (8, 2)  # on three ranks: 2, 3 and 3 examples; 0, 1 and 1


def _gathered() -> list[tuple[int, list[int], list[int]]]:
    """Return, for each batch: number of own examples, all gathered examples, fetched successors of the own ones."""
    collectives = Collectives()
    results = []
    for batch in BATCHES:
        rows = torch.arange(*share(batch, collectives.rank, collectives.world_size))
        followers = collectives.fetcher((rows + 1) % batch, batch)(rows)
        results.append((len(rows), collectives.gather_rows(rows, batch).tolist(), followers.tolist()))
    return results


def _told() -> tuple[list[Any], Any]:
    collectives = Collectives()
    rank = collectives.rank
    return collectives.gather_json({"rank": rank, "text": "é" * rank, "none": None}), collectives.broadcast_json(
        ["of rank 0", (1, 2.5)] if rank == 0 else "of another"
    )


def test_values_of_different_lengths_reach_every_rank() -> None:
    for gathered, broadcast in run_ranks(_told, 3):
        assert gathered == [{"rank": rank, "text": "é" * rank, "none": None} for rank in range(3)]
        assert broadcast == ["of rank 0", [1, 2.5]]


def test_trap_15_unequal_ranks_gather_and_fetch_all_rows() -> None:
    for batch, answers in zip(BATCHES, zip(*run_ranks(_gathered, 3), strict=True), strict=True):
        assert sum(size for size, _, _ in answers) == batch
        assert len({size for size, _, _ in answers}) == 2
        assert all(gathered == list(range(batch)) for _, gathered, _ in answers)
        assert [row for _, _, fetched in answers for row in fetched] == [(row + 1) % batch for row in range(batch)]
