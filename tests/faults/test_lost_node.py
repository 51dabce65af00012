"""Two nodes: a run over both goes on with what is there when one is lost, and grows back when it returns (C1, C4)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.ray_nodes import Cluster, raylets, wait_until
from tests.support.train_process import Campaign, assert_same_losses, paced

pytestmark = pytest.mark.slow

STEPS = 40
SECONDS = 900  # that anything is waited for: a loaded machine takes its time


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with raylets([1, 1]) as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """The run that nothing happens to, on one rank without Ray."""
    run = Campaign(tmp_path_factory.mktemp("runs"), "whole", STEPS).start_alone()
    run.finish()
    return run


def elastic(cluster: Cluster, folder: Path, name: str, *more: str) -> Campaign:
    """A run of two ranks, one on each node, that goes on with one."""
    keys = [f"cluster.address='{cluster.address}'", "cluster.workers=2", "cluster.min_workers=1"]
    keys += ["cluster.placement=spread", "cluster.start_seconds=20", "cluster.grow_seconds=1", *more]
    return Campaign(folder, name, STEPS, *keys, environment=cluster.environment)


def ranks(cluster: Cluster) -> list[int]:
    """How many each node has."""
    return [len(node.ranks()) for node in cluster.nodes]


def all_ranks(cluster: Cluster) -> list[psutil.Process]:
    return [rank for node in cluster.nodes for rank in node.ranks()]


@pytest.mark.timeout(2400)
def test_a_lost_node_leaves_the_losses_as_they_were_and_is_used_again(cluster: Cluster, whole: Campaign) -> None:
    run, lost = elastic(cluster, whole.folder, "lost").start(), cluster.others[0]
    with paced(run, lambda: all_ranks(cluster)):
        wait_until(lambda: run.step() > 5 or not run.running(), "the first steps", SECONDS)
        assert ranks(cluster) == [1, 1], run.told()

        before = run.step()
        lost.lose()
        wait_until(lambda: run.step() > before + 5 or not run.running(), "steps without the node", SECONDS)
        assert ranks(cluster) == [1, 0], run.told()

        lost.start()
        wait_until(lambda: ranks(cluster) == [1, 1] or not run.running(), "both nodes in use", SECONDS)
    run.finish()
    assert run.causes() == ["failed", "grown"]
    assert_same_losses(run.losses(), whole.losses())


@pytest.mark.timeout(2400)
def test_notice_of_a_nodes_end_costs_no_step(cluster: Cluster, whole: Campaign) -> None:
    cluster.wait_for_nodes(2)
    run = elastic(cluster, whole.folder, "warned", "checkpoint.every=1000").start()
    with paced(run, lambda: all_ranks(cluster)):
        wait_until(lambda: run.step() > 5 or not run.running(), "the first steps", SECONDS)
        cluster.announce_preemption(cluster.others[0], 600)
        wait_until(lambda: run.causes() or not run.running(), "the ranks to save and stop", SECONDS)
        assert run.causes() == ["preempted"]
        assert run.step() - run.saved()[-1] <= 1, "more than one step was lost"
        before = run.step()
        wait_until(lambda: run.step() > before or not run.running(), "steps on the node that stays", SECONDS)
        assert ranks(cluster) == [1, 0]
        cluster.others[0].lose()
        cluster.others[0].start()
    run.finish()
    assert run.causes()[:1] == ["preempted"]
    assert "failed" not in run.causes()
    assert_same_losses(run.losses(), whole.losses())


@pytest.mark.timeout(2400)
def test_a_lost_head_is_replaced_and_the_run_goes_on_under_its_name(cluster: Cluster, whole: Campaign) -> None:
    cluster.wait_for_nodes(2)
    run = elastic(cluster, whole.folder, "headless").start()
    with paced(run, lambda: all_ranks(cluster)):
        wait_until(lambda: run.step() > 5 or not run.running(), "the first steps", SECONDS)
        run.kill()  # a submitted run's driver is on the head
        cluster.stop()
    cluster.start()
    run.start().finish()
    assert_same_losses(run.losses(), whole.losses())
    with sqlite3.connect(whole.folder / "mlflow.db") as database:
        named = database.execute("SELECT count(*) FROM runs WHERE name = 'headless'").fetchone()
    assert named == (1,), "the run has another MLflow run since its restart"
