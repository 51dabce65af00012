"""How busy nodes are: a look at this one, and what rank 0 gathers of all."""

from __future__ import annotations

import json
import time

from pipeline.training.collectives import Collectives
from pipeline.training.nodes import Figures, Look, NodeMonitor, by_node
from tests.support.ranks import run_ranks

EVERYWHERE = {
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_usage_megabytes",
    "disk_available_megabytes",
}


def watch(names: list[str]) -> Figures:
    """On each rank, a node of its own; what rank 0 takes once it has heard of all."""
    collectives = Collectives()
    collectives.local_rank = 0
    monitor = NodeMonitor(collectives, seconds=0.1, name=names[collectives.rank])
    monitor.start()
    taken: Figures = {}
    deadline = time.monotonic() + 60
    while collectives.rank == 0 and time.monotonic() < deadline:
        taken |= monitor.take()
        if len({key.split("/")[1] for key in taken}) == len(names):
            break
        time.sleep(0.05)
    collectives.barrier()
    monitor.close()
    collectives.close()
    return taken


def test_rank_0_gathers_every_node_s_figures_under_its_name() -> None:
    taken, nothing = run_ranks(watch, 2, ["first", "second"])
    for node in ("first", "second"):
        assert {key.split("/")[2] for key in taken if key.startswith(f"system/{node}/")} >= EVERYWHERE
    assert nothing == {}


def test_two_nodes_of_one_name_are_told_apart() -> None:
    told = {rank: {"node": "host", "figures": {"cpu": float(rank)}} for rank in (0, 8)}
    assert by_node(told) == {"system/host/cpu": 0.0, "system/host-8/cpu": 8.0}


def test_a_look_gives_numbers_that_json_knows() -> None:
    figures = json.loads(json.dumps(Look()()))
    assert figures.keys() >= EVERYWHERE
    assert 0 < figures["system_memory_usage_percentage"] < 100
