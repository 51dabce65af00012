"""Two nodes: a run over both goes on with what is there when one is lost, and grows back when it returns (C1, C4)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import Campaign, assert_same_losses
from raylets import Cluster, raylets, wait_until

STEPS = 400


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with raylets([1, 1]) as running:
        yield running


def elastic(cluster: Cluster, folder: Path, name: str, *more: str) -> Campaign:
    """A run of two ranks, one on each node, that goes on with one."""
    keys = [f"cluster.address='{cluster.address}'", "cluster.workers=2", "cluster.min_workers=1"]
    keys += ["cluster.placement=spread", "cluster.start_seconds=20", "cluster.grow_seconds=1", *more]
    return Campaign(folder, name, STEPS, *keys, environment=cluster.environment)


def ranks(cluster: Cluster) -> list[int]:
    """How many each node has."""
    return [len(node.ranks()) for node in cluster.nodes]


@pytest.mark.timeout(1800)
def test_a_lost_node_leaves_the_losses_as_they_were_and_is_used_again(cluster: Cluster, tmp_path: Path) -> None:
    whole = Campaign(tmp_path, "whole", STEPS).start_alone()
    run = elastic(cluster, tmp_path, "run").start()
    lost = cluster.others[0]
    wait_until(lambda: run.step() > 5 or not run.running(), "the first steps", 600)
    assert ranks(cluster) == [1, 1], run.told()
    whole.finish()

    before = run.step()
    lost.lose()
    wait_until(lambda: run.step() > before + 10 or not run.running(), "steps without the node", 600)
    assert ranks(cluster) == [1, 0], run.told()

    lost.start()
    wait_until(lambda: ranks(cluster) == [1, 1] or not run.running(), "both nodes in use", 600)
    run.finish()
    assert_same_losses(run.losses(), whole.losses())
    assert [restart["cause"] for restart in run.restarts()] == ["failed", "grown"]
