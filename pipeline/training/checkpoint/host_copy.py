"""A rank's fragments in the host's memory: what training stops for, so that everything else can go on beside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.training.engine import Fragment


class HostCopy:
    """One buffer that is kept from save to save; page-locked beside a GPU, to which copies are then fast."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._buffer = torch.empty(0)

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Makes room now, which otherwise the first `take` would have to wait for."""
        self._grow(sum(len(value) for value in _by_key(fragments).values()))

    def take(self, fragments: Iterable[Fragment]) -> dict[str, Tensor]:
        """The fragments' values as float32, by "name|start|kind". They are those of now until the next `take`.

        Kinds follow each other, so that a rank that reads the weights of all, or its own moments, reads in a row.
        """
        values = _by_key(fragments)
        self._grow(sum(len(value) for value in values.values()))
        copies, at = {}, 0
        with torch.no_grad():
            for key, value in values.items():
                copies[key] = self._buffer[at : at + len(value)]
                copies[key].copy_(value, non_blocking=True)
                at += len(value)
        if self._is_cuda:
            torch.cuda.synchronize()  # the next step overwrites what is being copied
        return copies

    def _grow(self, size: int) -> None:
        if len(self._buffer) < size:
            self._buffer = torch.zeros(size, pin_memory=self._is_cuda)  # written to, so that its pages are there


def _by_key(fragments: Iterable[Fragment]) -> dict[str, Tensor]:
    values = [
        (kind, f"{fragment.name}|{fragment.start}|{kind}", value)
        for fragment in fragments
        for kind, value in fragment.values.items()
    ]
    return {key: value for _, key, value in sorted(values, key=lambda each: each[0])}
