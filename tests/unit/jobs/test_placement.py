"""A driver whose ranks are not placed says so at once, goes on saying so, and ends when they can never be."""

from __future__ import annotations

import pytest

from jobs import placement
from jobs.placement import Placement
from pipeline.config.errors import RunFailed
from pipeline.config.schema import ClusterConfig


class World:
    """A cluster, a clock and what the driver says."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, float]] = [{"CPU": 4.0}]
        self.now = 1000.0
        self.ranks: int | None = 0
        self.said: list[str] = []
        self.most: dict[str, float] | None = None

    def placement(self, **values: object) -> Placement:
        config = ClusterConfig.model_validate({"workers": 2, "start_seconds": 60, **values})
        made = Placement(config, "claim", clock=lambda: self.now)
        made.start()
        return made

    def let_pass(self, watched: Placement, seconds: int) -> None:
        for _ in range(seconds):
            watched.check()
            self.now += 1.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(placement, "usable_nodes", lambda: found.nodes)
    monkeypatch.setattr(placement, "notify", found.said.append)
    monkeypatch.setattr(placement, "_free_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(placement, "_autoscaler_limits", lambda: found.most)
    monkeypatch.setattr("jobs.mailbox.Mailbox.num_placed", lambda _: found.ranks)
    monkeypatch.setattr("jobs.mailbox.Mailbox.set_num_placed", lambda *_: None)
    return found


def test_a_local_ray_that_can_never_place_them_ends_before_it_begins(world: World) -> None:
    with pytest.raises(RunFailed, match=r"2 ranks need 2 GPUs; this cluster has 0.*cluster\.gpus_per_worker"):
        world.placement(gpus_per_worker=1)


def test_a_cluster_is_waited_for_aloud_until_start_seconds(world: World) -> None:
    waiting = world.placement(gpus_per_worker=1, address="head:6379")
    waiting.check()
    assert world.said == ["waiting: 0 of 2 workers placed; 2 GPUs requested, 0 in the cluster"]
    world.let_pass(waiting, 60)
    assert len(world.said) == 6, "it is said again every ten seconds"
    with pytest.raises(RunFailed, match=r"this cluster has 0.*none came in 6\d s.*start_seconds"):
        world.let_pass(waiting, 10)


def test_nodes_that_come_in_time_are_used(world: World) -> None:
    waiting = world.placement(gpus_per_worker=1, address="head:6379")
    world.let_pass(waiting, 50)
    world.nodes = [{"CPU": 4.0, "GPU": 2.0}]
    world.let_pass(waiting, 1000)
    assert world.said[-1] == "waiting: 0 of 2 workers placed; 2 CPUs requested, 4 in the cluster, 1 free; 2 GPUs " + (
        "requested, 2 in the cluster, 0 free"
    )
    world.ranks = 2
    waiting.check()
    assert world.said[-1] == "2 of 2 workers placed"
    assert waiting.ranks == 2


def test_an_autoscaler_that_can_bring_them_is_waited_for(world: World) -> None:
    world.most = {"CPU": 64, "GPU": 8}
    world.let_pass(world.placement(gpus_per_worker=1, address="head:6379"), 1000)
    world.most = {"CPU": 64, "GPU": 1}
    with pytest.raises(RunFailed, match="this cluster has 0"):
        world.let_pass(world.placement(gpus_per_worker=1, address="head:6379"), 100)


def test_ranks_that_were_placed_before_are_waited_for(world: World) -> None:
    """Their node is lost, and another may take its place."""
    waiting = world.placement(address="head:6379")
    world.ranks = 2
    world.let_pass(waiting, 5)
    assert world.said == [], "ranks that are placed quickly need no word"
    world.ranks, world.nodes = 0, [{"CPU": 1.0}]
    world.let_pass(waiting, 1000)
    assert world.said[0] == "waiting: 0 of 2 workers placed; 2 CPUs requested, 1 in the cluster"


def test_a_cluster_that_does_not_answer_is_asked_again(world: World) -> None:
    waiting = world.placement(gpus_per_worker=1, address="head:6379")
    world.ranks = None
    world.let_pass(waiting, 1000)
    assert world.said == []
