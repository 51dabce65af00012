"""A run's driver: the cluster it joins or starts, the placement of its ranks, its messages and its signals.

The first signal makes the ranks save, the second ends the driver at once; it always ends in bounded time.
"""

import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray._private.state import state
from ray.experimental import internal_kv

from jobs import cluster, driver, placement, train
from jobs.cluster import connect, for_ranks, keep_token_private, missing_resources
from jobs.console import Stopped
from jobs.driver import NUM_PLACED, STOP, Interrupts, Mailbox, forwarded_warnings
from jobs.placement import FAILED, Placement, PlacementCallback, Restarts
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import load_config, parse_config
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.data.storage import Storage
from pipeline.tracking.locations import absolute_uri, tracking_uri
from tests.support.failing_storage import FailingStorage, Fault
from tests.support.http_server import give, serving

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"
ours = logging.getLogger("pipeline.training.metrics")


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
        (None, None, None), (None, "local", None), ("local", "", None), ("auto", None, ("auto", "cluster.address")),
        ("head:6379", None, ("head:6379", "cluster.address")), (None, "other:6379", ("other:6379", "RAY_ADDRESS")),
        ("head:6379", "other:6379", ("head:6379", "cluster.address")),
        ("auto", "other:6379", ("other:6379", "RAY_ADDRESS")),
    ):  # fmt: skip
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", variable)
        assert cluster.address_of(ClusterConfig(address=named)) == expected
    for bracketed, plain in ((None, "head"), (None, "10.0.0.1"), ("::1", None), ("fe80::1%eth0", None)):
        address = f"{plain or f'[{bracketed}]'}:6379"
        assert cluster.HOST_AND_PORT.fullmatch(address).groups() == (bracketed, plain, "6379")
    for address in ("head", "head:", ":6379", "::1:6379", "[::1]", "head:port", "head:99999", "a b:1"):
        assert "expected host:port" in joined(address)
    assert "cannot place ranks" in joined("ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(RunFailed, match=r"^RAY_ADDRESS http://head:8265: "):
        connect(ClusterConfig())


def test_silent_port_other_service_and_failed_local_ray_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "HEAD_SECONDS", 0.5)
    for host in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as silent:
            port = silent.getsockname()[1]
            assert "is no Ray head" in joined(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    with serving(give("a page", 404)) as server:
        assert "is no Ray head" in joined(server.url.removeprefix("http://"))
    monkeypatch.setattr(cluster, "keep_token_private", Mock())
    long = OSError("AF_UNIX path length cannot exceed 107 bytes: /very/long")
    late = Exception("The current node timed out during startup.")
    for error, remedy in ((long, "set TMPDIR or RAY_TMPDIR"), (late, "mome doctor")):
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
MISSING: list[tuple[dict[str, Any], list[dict[str, float]], str | None]] = [  # requested, nodes, message
    ({}, [{"CPU": 1}, {"CPU": 1}], None), ({"gpus_per_worker": 0.5}, [{"CPU": 2, "GPU": 1}], None),
    ({"gpus_per_worker": 0.6}, [{"CPU": 2, "GPU": 2}], None), (LOADERS, [{"CPU": 2}, {"CPU": 2, "loader": 1}], None),
    ({"gpus_per_worker": 0.25, "workers": 8}, [{"CPU": 8, "GPU": 2}], None),
    ({"cpus_per_worker": 0.1, "workers": 10}, [{"CPU": 1}], None),
    ({"gpus_per_worker": 1, "workers": 4, "min_workers": 1}, [{"CPU": 8, "GPU": 1}], None),
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
]  # fmt: skip


def test_missing_resources_are_reported_with_their_keys() -> None:
    for requested, nodes, message in MISSING:
        missing = missing_resources(ClusterConfig.model_validate({"workers": 2, **requested}), nodes)
        assert missing is None if message is None else message in missing and "cluster." in missing, requested


class World(SimpleNamespace):
    """Simulated cluster and clock, and the driver's console output."""

    def placement(self, seconds: int = 0, **values: object) -> Placement:
        """Return the placement of two ranks, checked every second for some seconds."""
        keys = {"workers": 2, "start_seconds": 60, "address": "head:6379", **values}
        cluster = ClusterConfig.model_validate(keys)
        started = Placement(cluster, Mailbox("claim"), self.printed.append, clock=lambda: self.now)
        started.start()
        self.pass_seconds(started, seconds)
        return started

    def pass_seconds(self, watched: Placement, seconds: int) -> None:
        for _ in range(seconds):
            watched.check()
            self.now += 1.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    simulated = World(node={"CPU": 4.0}, now=1000.0, ranks=0, printed=[], limits=None)
    monkeypatch.setattr(placement, "usable_nodes", lambda: {"node": simulated.node})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: simulated.limits)
    monkeypatch.setattr(Mailbox, "get", lambda *_: simulated.ranks)
    monkeypatch.setattr(Mailbox, "put", lambda *_: True)
    return simulated


def test_waiting_is_reported_until_nodes_join_or_the_timeout(world: World) -> None:
    with pytest.raises(RunFailed, match=r"2 ranks need 2 GPUs; this cluster has 0.*cluster\.gpus_per_worker"):
        world.placement(gpus_per_worker=1, address=None)  # a local Ray never gets more
    waiting = world.placement(gpus_per_worker=1)
    waiting.check()
    assert world.printed == ["waiting: 0 of 2 workers placed; 2 GPUs requested, 0 in the cluster"]
    world.pass_seconds(waiting, 60)
    assert len(world.printed) == 6, "the message is repeated every ten seconds"
    with pytest.raises(RunFailed, match=r"this cluster has 0.*none came in 6\d s.*start_seconds"):
        world.pass_seconds(waiting, 10)
    waiting = world.placement(50, gpus_per_worker=1)
    world.node = {"CPU": 4.0, "GPU": 2.0}
    world.pass_seconds(waiting, 1000)
    amounts = "2 CPUs requested, 4 in the cluster, 1 free; 2 GPUs requested, 2 in the cluster, 0 free"
    assert world.printed[-1] == f"waiting: 0 of 2 workers placed; {amounts}"
    world.ranks = 2
    waiting.check()
    assert (world.printed[-1], waiting.ranks) == ("2 of 2 workers placed", 2)
    world.node, world.ranks, world.limits = {"CPU": 4.0}, 0, {"CPU": 64, "GPU": 8}
    world.placement(1000, gpus_per_worker=1)
    world.limits = {"CPU": 64, "GPU": 1}
    with pytest.raises(RunFailed, match="this cluster has 0"):
        world.placement(100, gpus_per_worker=1)


def test_driver_waits_for_ranks_that_were_placed_before_and_for_a_cluster_that_does_not_answer(world: World) -> None:
    world.ranks = None
    world.placement(1000, gpus_per_worker=1)
    world.ranks = 2
    waiting = world.placement(5)
    assert world.printed == [], "ranks that are placed quickly need no message"
    world.ranks, world.node = 0, {"CPU": 1.0}  # their node was lost, and another may replace it
    world.pass_seconds(waiting, 1000)
    assert world.printed[0] == "waiting: 0 of 2 workers placed; 2 CPUs requested, 1 in the cluster"


def test_ranks_use_the_same_files_and_resolve_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank").mkdir()
    for override in ("output=runs", "output=s3://bucket/runs", "tracking.uri=sqlite:///mine.db"):
        monkeypatch.chdir(tmp_path)
        config = load_config(DEMO, [override])
        expected, settled = absolute_uri(tracking_uri(config)), for_ranks(config)
        monkeypatch.chdir(tmp_path / "rank")
        assert tracking_uri(settled) == expected
        assert settled.sources["scenes"].shards == str(tmp_path / "runs/demo-data/scenes")
        assert settled.output == ("s3://bucket/runs" if "s3" in override else str(tmp_path / "runs"))
        assert "sqlite" not in override or settled.tracking.uri == f"sqlite:///{tmp_path}/mine.db"
        assert for_ranks(settled) == settled
    monkeypatch.delenv("SERVER", raising=False)  # set only on the cluster's nodes
    config = load_config(DEMO, ["tracking.uri=env:SERVER"])
    for settled in (for_ranks(config), for_ranks(config, address="auto")):
        assert settled.tracking.uri == "env:SERVER"
    with pytest.raises(ConfigError, match=r"cluster\.min_workers: 3 is above cluster\.workers 2"):
        for_ranks(config, min_workers=3)
    places = {
        "tracking": {"uri": "http://u:hunter2@server:5000"},
        "storage": {"endpoint_url": "http://u:hunter2@store:9000"},
    }
    config = parse_config(json.dumps(load_config(DEMO).model_dump(mode="json") | places), "run.json")
    assert (config.tracking.uri, config.storage.endpoint_url) == ("http://server:5000", "http://store:9000")


class KeyValues(dict[bytes, bytes]):
    """Key-value store of a Ray cluster, which may be unavailable: then reaching its methods fails."""

    is_away = False

    def __getattr__(self, name: str) -> Any:
        if self.is_away:
            raise RuntimeError("the head does not answer")
        return {
            "internal_kv_get": lambda key, *_: self.get(key),
            "internal_kv_put": lambda key, value, *_: self.update({key: value}) or 1,
            "internal_kv_keys": lambda prefix, *_: [key for key in self if key.startswith(prefix)][::-1],
            "internal_kv_del": lambda key, by_prefix, *_: len(
                [self.pop(name) for name in list(self) if name == key or (by_prefix and name.startswith(key))]
            ),
        }[name]


def test_one_start_exchanges_warnings_and_values_and_an_absent_head_blocks_none(monkeypatch: Any) -> None:
    mail, store = Mailbox("claim"), KeyValues()
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: store)
    monkeypatch.setattr(driver, "RETRY_SECONDS", 0.01)
    with forwarded_warnings(mail):
        for number in range(20):
            ours.warning("alert %d", number, extra={"alert": "vision/itm_collapse"})
        ours.info("no warning")
        logging.getLogger("urllib3.connection").warning("none of ours")
    ours.warning("too late")
    received = [(message["text"], message["alert"]) for message in mail.receive()]
    assert received == [(f"alert {number}", "vision/itm_collapse") for number in range(20)]
    assert mail.receive() == Mailbox("another").receive() == []
    with forwarded_warnings(mail):
        ours.warning("hung")
        (handler,) = (handler for handler in logging.getLogger().handlers if type(handler).__name__ == "Forward")
        handler.flush()  # by `logging.shutdown` before `os._exit` in a hung rank, which leaves no block
        assert [message["text"] for message in mail.receive()] == ["hung"]
    rank = Mailbox("claim")
    assert (rank.get(STOP), mail.put(STOP, 1), rank.get(STOP), Mailbox("later").get(STOP)) == (None, True, "1", None)
    callback = PlacementCallback(Mailbox("claim"))
    for event, expected in ((callback.after_worker_group_start, "2"), (callback.before_worker_group_shutdown, "0")):
        event(SimpleNamespace(get_workers=lambda: [1, 2]))
        assert mail.get(NUM_PLACED) == expected
    assert rank.put(NUM_PLACED, 3)
    callback.before_worker_group_start(None)
    assert mail.get(NUM_PLACED) == "0", "the message of a shutdown may be lost; a failed start has no shutdown"
    mail.call("del", "", True)
    assert store == {}
    store.is_away = True
    assert (mail.get(NUM_PLACED), mail.put(STOP, 1), mail.receive()) == (None, False, [])
    with forwarded_warnings(rank):
        for number in range(3 * driver.MAX_QUEUED):
            ours.warning("line %d", number)
        store.is_away = False
    assert mail.receive()[0]["text"] == "line 0"


def test_driver_prints_alerts_of_ranks_and_keeps_the_open_ones() -> None:
    collapse, clamp = ({"level": "WARNING", "alert": f"vision/{name}"} for name in ("itm_collapse", "itc_clamp"))
    resumed = {"level": "WARNING", "text": "resuming stage vision at step 130"}
    over = {**clamp, "text": "over", "over": True}
    received = [[{**collapse, "text": "collapsed"}, {**clamp, "text": "clamped"}], [resumed], [over]]
    printed, mail, open_alerts = list[str](), Mock(receive=lambda: received.pop(0)), dict[str, str]()
    train.show_messages(mail, open_alerts, printed.append)
    assert open_alerts == {"vision/itm_collapse": "collapsed", "vision/itc_clamp": "clamped"}
    train.show_messages(mail, open_alerts, printed.append)
    train.show_messages(mail, open_alerts, printed.append, is_last=True)
    assert open_alerts == {"vision/itm_collapse": "collapsed"}
    texts = ("collapsed", "clamped", "resuming stage vision at step 130", "over")
    assert printed == [*texts, "alert not over: collapsed"]


def test_causes_of_restarts_are_shown_once_and_an_unavailable_store_only_delays_them(tmp_path: Path) -> None:
    config = load_config(DEMO, [f"output={tmp_path}", "name=run", "cluster.max_failures=3"])
    restarts, shown = Restarts(config.storage, f"{config.folder}/restarts", "0-driver"), list[str]()
    for cause, message in ((FAILED, "rank 0: lost"), ("preempted", "saved"), (FAILED, "rank 1: killed")):
        restarts.record(cause, message)
    outage = FailingStorage(Fault(0, lasting=True))
    assert train.announce_restarts(config, restarts, outage, 0, shown.append) == 0
    assert shown == []
    known = train.announce_restarts(config, restarts, Storage(), 1, shown.append)
    assert (known, shown) == (2, ["restart 2 of at most 3 from step 0: rank 1: killed"])
    assert train.announce_restarts(config, restarts, Storage(), known, shown.append) == 2
    Storage().write(f"{config.folder}/failure.json", b"{}")  # the ranks start only to return
    restarts.record(FAILED, "rank 0: not finite")
    assert train.announce_restarts(config, restarts, Storage(), known, shown.append) == 2
    assert len(shown) == 1


def drive(config: RunConfig, mail: Any, ranks: int, seconds: float = 0.0) -> None:
    """Send SIGTERM to a driver, and check five times, or for some seconds."""
    handlers, end = Interrupts(config), time.monotonic() + seconds
    with suppress(Stopped):
        with handlers.deferred():
            handlers.check(mail, ranks)
            handlers.on_signal(signal.SIGTERM, None)
            for _ in range(5):
                handlers.check(mail, ranks)
            while time.monotonic() < end:
                handlers.check(mail, ranks)
                time.sleep(0.05)
        pytest.fail("the driver went on after a signal")


AWAY = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}


def test_placed_ranks_save_while_the_store_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, started = list[str](), time.monotonic()
    monkeypatch.setattr(driver, "notify", printed.append)
    monkeypatch.setattr(driver, "END_SECONDS", 1e8)  # the timeout would end the test process
    config, mail = load_config(DEMO, [f"output={tmp_path}"]), Mock()
    drive(config, mail, ranks=0, seconds=60)  # no rank could save
    assert (mail.put.call_count, printed) == (0, [])
    assert time.monotonic() - started < 30
    for accepted in ([True], [False, True]):  # the first request may be lost
        mail.put = Mock(side_effect=accepted)
        drive(config, mail, ranks=2)
        assert [call.args[0] for call in mail.put.call_args_list] == [STOP] * len(accepted)
    assert [message.partition(" after")[0] for message in printed] == 2 * ["SIGTERM: the ranks save"]
    monkeypatch.setattr(driver, "UNREACHABLE_SECONDS", 0.2)
    for name, value in AWAY.items():
        monkeypatch.setenv(name, value)
    drive(config.model_copy(update={"output": "s3://bucket/runs"}), Mock(), ranks=2, seconds=20)
    assert "has not answered" in printed[-1]


SCRIPT = """
import os, signal, sys, time
from jobs import driver
from pipeline.config.load import load_config

driver.END_SECONDS, driver.ANSWER_SECONDS = float(sys.argv[2]), 0.2
config = load_config("configs/demo.yaml", [f"output={sys.argv[1]}"])
try:
    with driver.Interrupts(config).handled():
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep(float(sys.argv[3]))  # a store that is away
except driver.Stopped as stopped:
    sys.stderr.flush()
    os._exit(stopped.args[0])
"""
# Another thread receives the signal, and no Python signal handler runs.
BLOCKED = SCRIPT.replace("    time.sleep(60)", "    signal.pthread_sigmask(0, [2, 15]); time.sleep(60)", 1)


STOPPED = "no checkpoint yet; re-run the same command to resume"
ENDS: list[tuple[str, str, str, float, float, int, str]] = [  # script, output, signals, END_SECONDS, held, status, text
    (SCRIPT, "", "TERM", 600, 0, 75, f"stopped (SIGTERM): {STOPPED}"),
    (SCRIPT, "", "INT", 600, 0, 130, f"stopped (SIGINT): {STOPPED}"),
    (SCRIPT, "", "TERM INT", 600, 60, 130, "ended at once"), (SCRIPT, "", "INT TERM", 600, 60, 75, "ended at once"),
    (SCRIPT, "", "TERM", 0.5, 60, 75, "ended now"), (BLOCKED, "", "INT", 0.5, 0, 130, "ended now"),
    (SCRIPT, "s3://bucket/runs", "INT", 600, 0, 130, "the store does not answer; re-run"),
]  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_driver_ends_although_its_cleanup_its_main_thread_or_the_store_hangs(case: Any, tmp_path: Path) -> None:
    script, output, signals, end, hold, status, message = case
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(AWAY if output else {})}
    command = [sys.executable, "-c", script, output or str(tmp_path), str(end), str(hold)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        for name in signals.split():
            time.sleep(0.3 if script is BLOCKED else 0.0)
            process.send_signal(signal.Signals[f"SIG{name}"])
            time.sleep(0.3)
        assert process.wait(timeout=50) == status
        assert message in process.stderr.read()
