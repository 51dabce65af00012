"""A run over two nodes continues on one when the other is lost, and grows back when it returns (C1, C4)."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.ray_nodes import Cluster, raylets, wait_until
from tests.support.train_process import TrainProcess, assert_same_losses, paced

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

STEPS = 24
SECONDS = 900  # timeout of every wait on a loaded machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with raylets([1, 1]) as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainProcess:
    """Return the uninterrupted run, on one rank without Ray."""
    run = TrainProcess(tmp_path_factory.mktemp("runs"), "whole", STEPS).start_alone()
    run.finish()
    return run


def ranks(cluster: Cluster) -> list[int]:
    """Return the number of ranks on each node."""
    return [len(node.ranks()) for node in cluster.nodes]


@contextmanager
def elastic(cluster: Cluster, folder: Path, name: str, *more: str) -> Iterator[TrainProcess]:
    """Run two ranks, one on each node, that can continue with one; yield the run after its first steps."""
    cluster.wait_for_nodes(2)
    keys = [f"cluster.address='{cluster.address}'", "cluster.workers=2", "cluster.min_workers=1"]
    keys += ["cluster.placement=spread", "cluster.start_seconds=20", "cluster.grow_seconds=1", *more]
    run = TrainProcess(folder, name, STEPS, *keys, environment=cluster.environment).start()
    with paced(run, cluster.ranks):
        wait_until(lambda: run.step() > 5 or not run.running(), "the first steps", SECONDS)
        assert ranks(cluster) == [1, 1], run.log_text()
        yield run


def test_losing_a_node_changes_no_loss(cluster: Cluster, whole: TrainProcess) -> None:
    lost = cluster.others[0]
    with elastic(cluster, whole.folder, "lost") as run:
        before = run.step()
        lost.lose()
        # One step may have been in flight.
        wait_until(lambda: run.step() > before + 1 or not run.running(), "a step without the node", SECONDS)
        assert ranks(cluster) == [1, 0], run.log_text()
        lost.start()
        wait_until(lambda: ranks(cluster) == [1, 1] or not run.running(), "both nodes in use", SECONDS)
    run.finish()
    assert run.restart_causes() == ["failed", "grown"]
    assert_same_losses(run.losses(), whole.losses())


def test_announced_preemption_of_a_node_costs_no_step(cluster: Cluster, whole: TrainProcess) -> None:
    with elastic(cluster, whole.folder, "warned", "checkpoint.every=1000") as run:
        cluster.announce_preemption(cluster.others[0], 600)
        wait_until(lambda: run.restart_causes() or not run.running(), "the ranks to save and stop", SECONDS)
        assert run.restart_causes() == ["preempted"]
        assert run.step() - run.saved_steps()[-1] <= 1, "more than one step was lost"
        before = run.step()
        wait_until(lambda: run.step() > before or not run.running(), "steps on the node that stays", SECONDS)
        assert ranks(cluster) == [1, 0]
        cluster.others[0].lose()
        cluster.others[0].start()
    run.finish()
    assert run.restart_causes()[:1] == ["preempted"]
    assert "failed" not in run.restart_causes()
    assert_same_losses(run.losses(), whole.losses())


def test_run_resumes_under_its_name_on_a_new_head(cluster: Cluster, whole: TrainProcess) -> None:
    with elastic(cluster, whole.folder, "headless") as run:
        run.kill()  # a submitted run's driver is on the head
        cluster.stop()
    cluster.start()
    run.start().finish()
    assert_same_losses(run.losses(), whole.losses())
    with sqlite3.connect(whole.folder / "mlflow.db") as database:
        named = database.execute("SELECT count(*) FROM runs WHERE name = 'headless'").fetchone()
    assert named == (1,), "the run has another MLflow run since its restart"
