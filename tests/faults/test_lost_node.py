"""A run over two nodes continues on one when the other is lost, and grows back when it returns (C1, C4)."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.ray_nodes import Cluster, network, raylets
from tests.support.train_process import TrainProcess, paced

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

STEPS = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with raylets([1, 1]) as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainProcess:
    return TrainProcess(tmp_path_factory.mktemp("runs"), "whole", STEPS).start("pipeline.training").finish()


def ranks(cluster: Cluster) -> list[int]:
    return [len(node.ranks()) for node in cluster.nodes]


@contextmanager
def elastic(cluster: Cluster, whole: TrainProcess, name: str, *more: str) -> Iterator[TrainProcess]:
    """Run a rank on each node; yield the run after its first steps; then its losses must be those of `whole`."""
    cluster.wait_for_nodes(2)
    keys = (*cluster.elastic, *more)
    run = TrainProcess(whole.folder, name, STEPS, *keys, environment=cluster.environment).start()
    with paced(run, cluster.ranks):
        run.wait_for(lambda: run.step() > 5, "the first steps")
        assert ranks(cluster) == [1, 1], run.log_text()
        yield run
    assert run.finish().losses() == pytest.approx(whole.losses(), rel=1e-5, abs=0)


def test_run_continues_without_an_unreachable_node(whole: TrainProcess) -> None:
    """The node loses its network while its processes live and no connection is closed."""
    with network() as linked:
        if linked is None:
            pytest.skip("network namespaces are not permitted here")
        hosts, cut = linked
        with raylets([1, 1], hosts=hosts) as cluster, elastic(cluster, whole, "cut") as run:
            cut()
            assert cluster.others[0].ranks(), "its processes are alive; only the network is gone"
    assert run.restart_causes() == ["failed"]


def test_losing_a_node_changes_no_loss(cluster: Cluster, whole: TrainProcess) -> None:
    lost = cluster.others[0]
    with elastic(cluster, whole, "lost") as run:
        before = run.step()
        lost.lose()
        run.wait_for(lambda: run.step() > before + 1, "a step without the node")  # one may have been in flight
        assert ranks(cluster) == [1, 0], run.log_text()
        assert "restart 1 of at most" in run.log_text()
        assert "(raylet)" not in run.log_text()
        lost.start()
        run.wait_for(lambda: ranks(cluster) == [1, 1], "both nodes in use")
    assert run.restart_causes() == ["failed", "grown"]


def test_announced_preemption_of_a_node_costs_no_step(cluster: Cluster, whole: TrainProcess) -> None:
    with elastic(cluster, whole, "warned", "checkpoint.every=1000") as run:
        cluster.announce_preemption(cluster.others[0], 600)
        run.wait_for(run.restart_causes, "the ranks to save and stop")
        assert run.restart_causes() == ["preempted"]
        assert run.step() - run.saved_steps()[-1] <= 1, "more than one step was lost"
        before = run.step()
        run.wait_for(lambda: run.step() > before, "steps on the node that stays")
        assert ranks(cluster) == [1, 0]
        cluster.others[0].lose()
        cluster.others[0].start()
    assert run.restart_causes()[:1] == ["preempted"]
    assert "failed" not in run.restart_causes()


def test_run_resumes_under_its_name_on_a_new_head(cluster: Cluster, whole: TrainProcess) -> None:
    with elastic(cluster, whole, "headless") as run:
        run.kill()  # a submitted run's driver is on the head
        cluster.stop()
        cluster.start()
        run.start()
    with sqlite3.connect(whole.folder / "mlflow.db") as database:
        named = database.execute("SELECT count(*) FROM runs WHERE name = 'headless'").fetchone()
    assert named == (1,), "the run has another MLflow run since its restart"
