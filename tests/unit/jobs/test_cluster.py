"""Joining or starting Ray: every failure is one message within seconds, and nothing is accessible to other users.

The resources that ranks request are compared with those of the nodes before any rank is placed; a driver whose ranks
are not placed reports it at once and periodically, and ends when they cannot be placed.
"""

import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray._private.state import state

from jobs import cluster, placement
from jobs.cluster import connect, keep_token_private, missing_resources
from jobs.driver import Mailbox
from jobs.placement import Placement
from pipeline.config.errors import RunFailed
from pipeline.config.schema import ClusterConfig
from tests.support.http_server import give, serving


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove Ray's environment variables and fail the test if it starts or joins Ray."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was asked to connect"))


def joined(address: str) -> str:
    """Return the error message of connecting to this address."""
    with pytest.raises(RunFailed) as error:
        connect(ClusterConfig(address=address))
    assert str(error.value).startswith(f"cluster.address {address}: no Ray cluster answers")
    return str(error.value)


def test_address_is_returned_with_its_origin_and_a_malformed_one_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, variable, expected in (
        (None, None, None),
        (None, "local", None),
        ("head:6379", None, ("head:6379", "cluster.address")),
        ("head:6379", "other:6379", ("head:6379", "cluster.address")),
        (None, "other:6379", ("other:6379", "RAY_ADDRESS")),
        ("auto", "other:6379", ("other:6379", "RAY_ADDRESS")),
        ("auto", None, ("auto", "cluster.address")),
        ("local", "", None),
    ):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", variable)
        assert cluster.address_of(ClusterConfig(address=named)) == expected
    for address, groups in {
        "head:6379": (None, "head", "6379"),
        "10.0.0.1:6379": (None, "10.0.0.1", "6379"),
        "[::1]:6379": ("::1", None, "6379"),
        "[fe80::1%eth0]:6379": ("fe80::1%eth0", None, "6379"),
    }.items():
        assert cluster.HOST_AND_PORT.fullmatch(address).groups() == groups
    for address in ("head", "head:", ":6379", "::1:6379", "[::1]", "head:port", "head:99999", "a b:1"):
        assert "expected host:port" in joined(address)
    assert "cannot place ranks" in joined("ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(RunFailed, match=r"^RAY_ADDRESS http://head:8265: "):
        connect(ClusterConfig())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_of_another_service_and_a_silent_port_are_reported(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr(cluster, "HEAD_SECONDS", 0.5)
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as silent:
        port = silent.getsockname()[1]
        assert "is no Ray head" in joined(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    with serving(give("a page", 404)) as server:
        assert "is no Ray head" in joined(server.url.removeprefix("http://"))


def test_local_ray_that_does_not_start_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for error, remedy in (
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /very/long"), "set TMPDIR or RAY_TMPDIR"),
        (Exception("The current node timed out during startup."), "mome doctor"),
    ):
        monkeypatch.setattr(ray, "init", Mock(side_effect=error))
        with pytest.raises(RunFailed, match=f"Ray did not start on this machine .*{remedy}"):
            connect(ClusterConfig())


def test_token_is_private_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".ray" / "auth_token"
    keep_token_private()
    token = file.read_text()
    assert len(token) == 64
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o600, 0o700]
    file.chmod(0o644)
    keep_token_private()
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (token, 0o600), "and a token there stays"
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.expanduser", lambda path: path.replace("~", os.environ["HOME"]))
    for home in ("/dev/null", "/proc/no-such", "~"):  # where no file can be written, or there is none
        monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "")
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        keep_token_private()
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.listdir(tmp_path) == [".ray"]


LOADERS = {"loader_actors": 1, "loader_resource": "loader"}


@pytest.mark.parametrize(
    ("requested", "nodes", "message"),
    [
        ({}, [{"CPU": 1}, {"CPU": 1}], None),
        ({"gpus_per_worker": 0.5}, [{"CPU": 2, "GPU": 1}], None),
        ({"gpus_per_worker": 0.6}, [{"CPU": 2, "GPU": 2}], None),
        ({"gpus_per_worker": 0.25, "workers": 8}, [{"CPU": 8, "GPU": 2}], None),
        ({"cpus_per_worker": 0.1, "workers": 10}, [{"CPU": 1}], None),
        ({"gpus_per_worker": 1, "workers": 4, "min_workers": 1}, [{"CPU": 8, "GPU": 1}], None),
        (LOADERS, [{"CPU": 2}, {"CPU": 2, "loader": 1}], None),
        ({"gpus_per_worker": 1}, [{"CPU": 4}], "2 ranks need 2 GPUs; this cluster has 0. Set cluster.gpus_per_worker"),
        ({"gpus_per_worker": 1, "workers": 1}, [{"CPU": 4}], "1 rank needs 1 GPU; this cluster has 0"),
        ({"workers": 9, "min_workers": 3}, [{"CPU": 2}], "3 ranks need 3 CPUs; this cluster has 2. Set cluster.cpus"),
        ({"cpus_per_worker": 8}, [{"CPU": 4}] * 4, "each of 2 ranks needs 8 CPUs on one node; there is room for 0"),
        ({"gpus_per_worker": 2}, [{"CPU": 4, "GPU": 1}] * 4, "needs 1 CPU and 2 GPUs on one node"),
        ({"gpus_per_worker": 1}, [{"CPU": 9}, {"GPU": 2, "CPU": 1}], "there is room for 1"),
        ({"gpus_per_worker": 0.6, "workers": 3}, [{"CPU": 9, "GPU": 2}], "there is room for 2"),
        ({"gpus_per_worker": 0.4, "workers": 5}, [{"CPU": 9, "GPU": 2}], "there is room for 4"),
        ({**LOADERS, "loader_actors": 3}, [{"CPU": 9}], "2 ranks need 0.006 of 'loader', which"),
        ({"loader_actors": 3, "loader_cpus": 0.5}, [{"CPU": 4}], "2 ranks need 5 CPUs; this cluster has 4"),
        ({"loader_actors": 4}, [{"CPU": 8}], "2 ranks need 10 CPUs"),
        ({**LOADERS, "loader_actors": 2}, [{"CPU": 9}, {"CPU": 1, "loader": 1}], "on nodes that offer 'loader'"),
        ({}, [], "2 ranks need 2 CPUs; this cluster has 0"),
    ],
)
def test_missing_resources_are_reported_with_their_keys(
    requested: dict[str, Any], nodes: list[dict[str, float]], message: str | None
) -> None:
    missing = missing_resources(ClusterConfig.model_validate({"workers": 2, **requested}), nodes)
    assert missing is None if message is None else message in missing and "cluster." in missing


# ---- waiting for ranks to be placed


class World(SimpleNamespace):
    """Simulated cluster and clock, and the driver's console output."""

    def placement(self, **values: object) -> Placement:
        keys = {"workers": 2, "start_seconds": 60, "address": "head:6379", **values}
        started = Placement(ClusterConfig.model_validate(keys), "claim", clock=lambda: self.now)
        started.start()
        return started

    def pass_seconds(self, watched: Placement, seconds: int) -> None:
        for _ in range(seconds):
            watched.check()
            self.now += 1.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    simulated = World(node={"CPU": 4.0}, now=1000.0, ranks=0, printed=[], limits=None)
    monkeypatch.setattr(cluster, "usable_nodes", lambda: {"node": simulated.node})
    monkeypatch.setattr(placement, "notify", simulated.printed.append)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: simulated.limits)
    monkeypatch.setattr(Mailbox, "get", lambda *_: simulated.ranks)
    monkeypatch.setattr(Mailbox, "put", lambda *_: True)
    return simulated


def test_waiting_is_reported_until_nodes_join_or_the_timeout_and_an_autoscaler_is_awaited(world: World) -> None:
    with pytest.raises(RunFailed, match=r"2 ranks need 2 GPUs; this cluster has 0.*cluster\.gpus_per_worker"):
        world.placement(gpus_per_worker=1, address=None)  # a local Ray never gets more
    waiting = world.placement(gpus_per_worker=1)
    waiting.check()
    assert world.printed == ["waiting: 0 of 2 workers placed; 2 GPUs requested, 0 in the cluster"]
    world.pass_seconds(waiting, 60)
    assert len(world.printed) == 6, "the message is repeated every ten seconds"
    with pytest.raises(RunFailed, match=r"this cluster has 0.*none came in 6\d s.*start_seconds"):
        world.pass_seconds(waiting, 10)
    waiting = world.placement(gpus_per_worker=1)
    world.pass_seconds(waiting, 50)
    world.node = {"CPU": 4.0, "GPU": 2.0}
    world.pass_seconds(waiting, 1000)
    amounts = "2 CPUs requested, 4 in the cluster, 1 free; 2 GPUs requested, 2 in the cluster, 0 free"
    assert world.printed[-1] == f"waiting: 0 of 2 workers placed; {amounts}"
    world.ranks = 2
    waiting.check()
    assert (world.printed[-1], waiting.ranks) == ("2 of 2 workers placed", 2)
    world.node, world.ranks, world.limits = {"CPU": 4.0}, 0, {"CPU": 64, "GPU": 8}
    world.pass_seconds(world.placement(gpus_per_worker=1), 1000)
    world.limits = {"CPU": 64, "GPU": 1}
    with pytest.raises(RunFailed, match="this cluster has 0"):
        world.pass_seconds(world.placement(gpus_per_worker=1), 100)


def test_driver_waits_for_ranks_that_were_placed_before_and_for_a_cluster_that_does_not_answer(world: World) -> None:
    unanswered, world.ranks = world.placement(gpus_per_worker=1), None
    world.pass_seconds(unanswered, 1000)
    waiting, world.ranks = world.placement(), 2
    world.pass_seconds(waiting, 5)
    assert world.printed == [], "ranks that are placed quickly need no message"
    world.ranks, world.node = 0, {"CPU": 1.0}  # their node was lost, and another may replace it
    world.pass_seconds(waiting, 1000)
    assert world.printed[0] == "waiting: 0 of 2 workers placed; 2 CPUs requested, 1 in the cluster"
