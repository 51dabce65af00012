"""How long this rank's own work takes, before any rank waits for another.

A slow machine makes every rank slow, because they meet at each reduction; so what is timed is the forward alone. Below
ZeRO 3 it waits for nobody. On a GPU the stream's own events tell the time, and are read only where the loop waits for
the device anyway.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Events = tuple[torch.cuda.Event, torch.cuda.Event]


class Pace:
    """The seconds of this rank's forwards since the last reading."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: list[float] = []
        self._events: list[Events] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward."""
        if self._on_gpu:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - began)

    def read(self) -> float:
        """The median, which the first steps and those that the graph guard checks do not move; 0 without a forward.

        To be called where the device has done its work.
        """
        self._seconds += [start.elapsed_time(end) / 1000 for start, end in self._events]
        median = statistics.median(self._seconds) if self._seconds else 0.0
        self._seconds, self._events = [], []
        return median
