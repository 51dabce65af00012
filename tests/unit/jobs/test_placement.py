"""A driver whose ranks are not placed reports it at once and periodically, and ends when they cannot be placed."""

from __future__ import annotations

import pytest
import ray
from ray._private.state import state

from jobs import placement
from jobs.placement import Placement
from pipeline.config.errors import RunFailed
from pipeline.config.schema import ClusterConfig


class World:
    """Simulated cluster and clock, and the driver's console output."""

    def __init__(self) -> None:
        self.node: dict[str, float] = {"CPU": 4.0}
        self.now = 1000.0
        self.ranks: int | None = 0
        self.printed: list[str] = []
        self.autoscaler_limits: dict[str, float] | None = None

    def placement(self, **values: object) -> Placement:
        config = ClusterConfig.model_validate({"workers": 2, "start_seconds": 60, "address": "head:6379", **values})
        started = Placement(config, "claim", clock=lambda: self.now)
        started.start()
        return started

    def pass_seconds(self, watched: Placement, seconds: int) -> None:
        for _ in range(seconds):
            watched.check()
            self.now += 1.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    simulated = World()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("jobs.cluster.usable_nodes", lambda: {"node": simulated.node})
    monkeypatch.setattr(placement, "notify", simulated.printed.append)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: simulated.autoscaler_limits)
    monkeypatch.setattr("jobs.mailbox.Mailbox.get", lambda *_: simulated.ranks)
    monkeypatch.setattr("jobs.mailbox.Mailbox.put", lambda *_: True)
    return simulated


def test_local_ray_without_enough_resources_is_rejected(world: World) -> None:
    with pytest.raises(RunFailed, match=r"2 ranks need 2 GPUs; this cluster has 0.*cluster\.gpus_per_worker"):
        world.placement(gpus_per_worker=1, address=None)


def test_waiting_for_a_cluster_is_reported_until_the_timeout(world: World) -> None:
    waiting = world.placement(gpus_per_worker=1)
    waiting.check()
    assert world.printed == ["waiting: 0 of 2 workers placed; 2 GPUs requested, 0 in the cluster"]
    world.pass_seconds(waiting, 60)
    assert len(world.printed) == 6, "the message is repeated every ten seconds"
    with pytest.raises(RunFailed, match=r"this cluster has 0.*none came in 6\d s.*start_seconds"):
        world.pass_seconds(waiting, 10)


def test_nodes_that_join_in_time_are_used(world: World) -> None:
    waiting = world.placement(gpus_per_worker=1)
    world.pass_seconds(waiting, 50)
    world.node = {"CPU": 4.0, "GPU": 2.0}
    world.pass_seconds(waiting, 1000)
    assert world.printed[
        -1
    ] == "waiting: 0 of 2 workers placed; 2 CPUs requested, 4 in the cluster, 1 free; 2 GPUs " + (
        "requested, 2 in the cluster, 0 free"
    )
    world.ranks = 2
    waiting.check()
    assert world.printed[-1] == "2 of 2 workers placed"
    assert waiting.ranks == 2


def test_driver_waits_for_an_autoscaler_with_enough_nodes(world: World) -> None:
    world.autoscaler_limits = {"CPU": 64, "GPU": 8}
    world.pass_seconds(world.placement(gpus_per_worker=1), 1000)
    world.autoscaler_limits = {"CPU": 64, "GPU": 1}
    with pytest.raises(RunFailed, match="this cluster has 0"):
        world.pass_seconds(world.placement(gpus_per_worker=1), 100)


def test_driver_waits_for_ranks_that_were_placed_before(world: World) -> None:
    """Their node was lost, and another may replace it."""
    waiting = world.placement()
    world.ranks = 2
    world.pass_seconds(waiting, 5)
    assert world.printed == [], "ranks that are placed quickly need no message"
    world.ranks, world.node = 0, {"CPU": 1.0}
    world.pass_seconds(waiting, 1000)
    assert world.printed[0] == "waiting: 0 of 2 workers placed; 2 CPUs requested, 1 in the cluster"


def test_unresponsive_cluster_is_polled_again(world: World) -> None:
    waiting = world.placement(gpus_per_worker=1)
    world.ranks = None
    world.pass_seconds(waiting, 1000)
    assert world.printed == []
