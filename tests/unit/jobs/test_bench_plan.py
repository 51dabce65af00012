from __future__ import annotations

import numpy as np
import pytest

from jobs.bench.plan import bench_plan, simulated_sources
from pipeline.data import plan as module

SMALL = {"samples": 200_000, "shards": 400, "ranks": 24, "lanes": 48, "batch": 768}


def test_simulated_sources_hold_exactly_the_samples_and_shards_asked_for():
    sources = simulated_sources(1_000_000, 2000, seed=0)
    assert sum(int(source.counts.sum()) for source in sources.values()) == 1_000_000
    assert sum(len(source.counts) for source in sources.values()) == 2000
    largest = sources["source3"].counts
    assert largest.min() > 0
    assert largest.max() > 9 * largest.min()


def test_the_whole_plan_is_checked_and_reported():
    result = bench_plan(**SMALL, whole=True)
    assert result["checked"] == {"spans": 4 * 48, "lanes": 4 * 48, "samples": 200_000, "steps": 4 * 256}
    assert result["fetch_amplification"]["8"] == {"measured": 1.0, "formula": 1.0}
    assert result["fetch_amplification"]["64"] == {"measured": 2.0, "formula": 2.0}
    assert result["fetch_amplification"]["100"]["measured"] <= result["fetch_amplification"]["100"]["formula"] == 3.0
    assert set(result["milliseconds"]) == {"begin", "middle", "end", "after_1000_epochs"}


def test_memory_is_in_proportion_to_shards_not_samples():
    few, many = (
        bench_plan(**SMALL | {"samples": samples})["memory"]["plan_bytes"] for samples in (200_000, 20_000_000)
    )
    assert many < 1.1 * few


@pytest.mark.parametrize("whole", [False, True])
def test_a_plan_that_repeats_samples_is_noticed(monkeypatch: pytest.MonkeyPatch, whole: bool):
    monkeypatch.setattr(module, "permuted", lambda key, n, place: np.maximum(place - 1, 0))
    with pytest.raises(AssertionError, match="source 0: samples come twice or never"):
        bench_plan(**SMALL, whole=whole)


def test_a_plan_whose_lanes_leave_a_gap_is_noticed(monkeypatch: pytest.MonkeyPatch):
    right = module.LaneOrder.lane_start
    monkeypatch.setattr(module.LaneOrder, "lane_start", lambda self, *where: right(self, *where) + 1)
    with pytest.raises(AssertionError, match="lanes do not tile source 0"):
        bench_plan(**SMALL)
