"""Share an evaluation among ranks, with bit-identical results for any number of them.

Batches depend on row numbers alone, and a single rank computes each one. All ranks run equally many forwards, those
with fewer batches by repeating one, because at ZeRO-3 every forward gathers weights from all of them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config.errors import MomeError


class Ranks:
    """The processes that share an evaluation; all of them make every call together. This base is a single process."""

    rank = 0
    world_size = 1

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Return each rank's range (start, stop) of `count` items."""
        size = self.world_size
        return [(rank * count // size, (rank + 1) * count // size) for rank in range(size)]

    def gather_parts(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return all ranks' rows, `counts` of them per rank, in rank order on every rank."""
        return rows

    def gather_objects(self, value: Any) -> list[Any]:
        """Return all ranks' values on every rank."""
        return [value]


SINGLE_PROCESS = Ranks()


def rank_batches(count: int, batch: int, ranks: Ranks) -> Iterator[tuple[slice, bool]]:
    """Yield the rows of each batch that this rank computes, and whether the batch is its own or only keeps step."""
    num_batches = -(-count // batch)
    shares = ranks.shares(num_batches)
    start, stop = shares[ranks.rank]
    for turn in range(max(stop - start for start, stop in shares)):
        first = min(start + turn, num_batches - 1) * batch
        yield slice(first, min(first + batch, count)), start + turn < stop


def compute_batches(
    count: int, batch: int, ranks: Ranks, compute: Callable[[slice], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Return the results of the batches of `count` > 0 rows, of any length, concatenated in order on every rank."""
    results: list[tuple[Tensor, ...]] = []
    for rows, is_own in rank_batches(count, batch, ranks):
        result = compute(rows)
        results.append(result if is_own else tuple(tensor[:0] for tensor in result))
    own = [torch.cat(parts) for parts in zip(*results, strict=True)]
    counts = ranks.gather_objects(len(own[0]))
    return tuple(ranks.gather_parts(rows, counts) for rows in own)


@contextlib.contextmanager
def gathered(ranks: Ranks) -> Iterator[list[Any]]:
    """Share what each rank appends to the list inside `with`: afterwards it holds the items of all ranks, in order.

    The first rank's MomeError is raised on all ranks. No rank may call a collective inside, but forwards.
    """
    items: list[Any] = []
    failure: MomeError | None = None
    try:
        yield items
    except MomeError as error:
        failure = error
    results = ranks.gather_objects((items, failure))
    for _, other in results:
        if other is not None:
            raise other
    items[:] = [item for own, _ in results for item in own]
