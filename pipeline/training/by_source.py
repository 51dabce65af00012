"""Each source's own share of a step's losses, where a stage mixes sources: which of them is learnt, and which is not.

A term sums over rows, so its loss over one source's rows is that of the outputs it has, cut to these rows: no second
forward. It costs a copy of one source's outputs at a time, and is done where metrics are read anyway.

Shapes: n rows of this rank that an objective reads, S sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardOutput
from pipeline.training.terms.term import Term


def of_each_source(term: Term, outputs: ForwardOutput, rows: Batch, source: Tensor, num_sources: int) -> Tensor:
    """(S, 2) the term's loss, summed over each source's rows, and the summands' number.

    `source` (n,) is the rows' source, on the CPU.
    """
    found = []
    with torch.no_grad():
        for number in range(num_sources):
            which = torch.nonzero(source == number).flatten()
            if not len(which):
                found.append(torch.zeros(2, device=rows.uid.device))
                continue
            own: Any = {name: _Cut(heads, which, len(source)) for name, heads in outputs.items()}
            chosen = rows.rows(which)
            count = torch.as_tensor(term.count(chosen), device=rows.uid.device)
            found.append(torch.stack([term.loss(own, chosen).float(), count.float()]))
    return torch.stack(found)


class _Cut(Mapping[str, Tensor]):
    """A pass's outputs for some of its rows, cut when they are asked for. What is not of its rows stays whole."""

    def __init__(self, heads: Mapping[str, Tensor], which: Tensor, num_rows: int):
        self._heads, self._which, self._num_rows = heads, which, num_rows

    def __getitem__(self, name: str) -> Tensor:
        value = self._heads[name]
        if value.dim() == 0 or len(value) != self._num_rows:
            return value
        return value[self._which.to(value.device, non_blocking=True)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)
