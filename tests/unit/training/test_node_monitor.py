"""Node statistics: sampling on one node, and collection on rank 0."""

from __future__ import annotations

import json
import time

from pipeline.training.collectives import Collectives
from pipeline.training.node_monitor import Metrics, NodeMonitor, NodeSampler, metrics_by_node
from tests.support.ranks import run_ranks

EVERYWHERE = {
    "cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage",
    "disk_usage_percentage", "disk_usage_megabytes", "disk_available_megabytes",
}  # fmt: skip


def watch(names: list[str]) -> Metrics:
    """Run each rank as a node of its own; return the metrics rank 0 takes once all nodes have reported."""
    collectives = Collectives()
    collectives.local_rank = 0
    monitor = NodeMonitor(collectives, seconds=0.1, name=names[collectives.rank])
    monitor.start()
    taken: Metrics = {}
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


def test_rank_0_collects_statistics_of_every_node() -> None:
    taken, nothing = run_ranks(watch, 2, ["first", "second"])
    for node in ("first", "second"):
        assert {key.split("/")[2] for key in taken if key.startswith(f"system/{node}/")} >= EVERYWHERE
    assert nothing == {}


def test_nodes_of_the_same_name_are_distinguished_by_rank() -> None:
    reports = {rank: {"node": "host", "metrics": {"cpu": float(rank)}} for rank in (0, 8)}
    assert metrics_by_node(reports) == {"system/host/cpu": 0.0, "system/host-8/cpu": 8.0}


def test_sample_is_json_serialisable() -> None:
    metrics = json.loads(json.dumps(NodeSampler().sample()))
    assert 0 < metrics["system_memory_usage_percentage"] < 100
