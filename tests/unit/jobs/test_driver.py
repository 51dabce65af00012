"""A run's driver: what it resolves before ranks are placed, its messages from and to them, and its signals.

The first signal makes the ranks save, the second ends the driver at once; it always ends in bounded time.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.experimental import internal_kv

from jobs import driver, train
from jobs.cluster import for_ranks
from jobs.console import Stopped
from jobs.driver import NUM_PLACED, STOP, Interrupts, Mailbox, forwarded_warnings
from jobs.placement import PlacementCallback
from jobs.submit import for_cluster
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config, parse_config
from pipeline.config.schema import RunConfig
from pipeline.tracking.locations import absolute_uri, tracking_uri

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"
ours = logging.getLogger("pipeline.training.alerts")


@pytest.mark.parametrize("override", ["output=runs", "output=s3://bucket/runs", "tracking.uri=sqlite:///mine.db"])
def test_ranks_in_another_folder_use_the_same_files_and_mlflow(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rank").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(DEMO, [override])
    expected, settled = absolute_uri(tracking_uri(config)), for_ranks(config)
    monkeypatch.chdir(tmp_path / "rank")
    assert tracking_uri(settled) == expected
    assert settled.sources["scenes"].shards == str(tmp_path / "runs/demo-data/scenes")
    assert settled.output == ("s3://bucket/runs" if "s3" in override else str(tmp_path / "runs"))
    assert "sqlite" not in override or settled.tracking.uri == f"sqlite:///{tmp_path}/mine.db"
    assert for_ranks(settled) == settled


def test_references_stay_unresolved_and_recorded_passwords_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVER", raising=False)  # set only on the cluster's nodes
    config = load_config(DEMO, ["tracking.uri=env:SERVER"])
    for settled in (for_ranks(config), for_cluster(config, same_machine=True)):
        assert settled.tracking.uri == "env:SERVER"
    with pytest.raises(ConfigError, match=r"cluster\.min_workers: 3 is above cluster\.workers 2"):
        for_ranks(config, min_workers=3)
    values = json.loads(load_config(DEMO).model_dump_json())
    values["tracking"]["uri"] = "http://me:hunter2@server:5000"
    values["storage"]["endpoint_url"] = "http://me:hunter2@store:9000"
    config = parse_config(json.dumps(values), "run.json")
    assert (config.tracking.uri, config.storage.endpoint_url) == ("http://server:5000", "http://store:9000")


# ---- messages


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


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> KeyValues:
    values = KeyValues()
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: values)
    monkeypatch.setattr(driver, "RETRY_SECONDS", 0.01)
    return values


def test_warnings_and_values_are_exchanged_within_one_start_and_an_absent_head_blocks_neither_side(
    store: KeyValues,
) -> None:
    mail = Mailbox("claim")
    with forwarded_warnings(mail):
        for number in range(20):
            ours.warning("alert %d", number, extra={"alert": "vision/itm_collapse"})
        ours.info("no warning")
        logging.getLogger("urllib3.connection").warning("none of ours")
    ours.warning("too late")
    received = mail.receive()
    assert [message["text"] for message in received] == [f"alert {number}" for number in range(20)]
    assert {message["alert"] for message in received} == {"vision/itm_collapse"}
    assert mail.receive() == Mailbox("another").receive() == []
    with forwarded_warnings(mail):
        ours.warning("hung")
        (handler,) = (handler for handler in logging.getLogger().handlers if type(handler).__name__ == "Forward")
        handler.flush()  # by `logging.shutdown` before `os._exit` in a hung rank, which leaves no block
        assert [message["text"] for message in mail.receive()] == ["hung"]
    mail, rank = Mailbox("claim"), Mailbox("claim")
    assert rank.get(STOP) is None
    assert mail.put(STOP, 1)
    assert (rank.get(STOP), Mailbox("later").get(STOP)) == ("1", None)
    callback = PlacementCallback("claim")
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


def test_driver_prints_alerts_of_ranks_and_keeps_the_open_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    collapse, clamp = ({"level": "WARNING", "alert": f"vision/{name}"} for name in ("itm_collapse", "itc_clamp"))
    received = [
        [{**collapse, "text": "collapsed"}, {**clamp, "text": "clamped"}],
        [{"level": "WARNING", "text": "resuming stage vision at step 130"}],
        [{**clamp, "text": "over", "over": True}],
    ]
    printed, mail, open_alerts = list[str](), Mock(receive=lambda: received.pop(0)), dict[str, str]()
    monkeypatch.setattr(train, "notify", lambda text, *_: printed.append(text))
    train.show_messages(mail, open_alerts)
    assert open_alerts == {"vision/itm_collapse": "collapsed", "vision/itc_clamp": "clamped"}
    train.show_messages(mail, open_alerts)
    train.show_messages(mail, open_alerts, is_last=True)
    assert open_alerts == {"vision/itm_collapse": "collapsed"}
    texts = ("collapsed", "clamped", "resuming stage vision at step 130", "over")
    assert printed == [*(f"WARNING {text}" for text in texts), "alert not over: collapsed"]


# ---- signals


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


def test_placed_ranks_are_requested_to_save_while_the_store_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
from pathlib import Path
from jobs import driver
from pipeline.config.load import load_config

driver.END_SECONDS, driver.ANSWER_SECONDS = float(sys.argv[2]), 0.2
try:
    with driver.Interrupts(load_config(Path("configs/demo.yaml"), [f"output={sys.argv[1]}"])).handled():
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


@pytest.mark.parametrize(
    ("script", "output", "signals", "end", "hold", "status", "message"),
    [
        (SCRIPT, "", "TERM", 600, 0, 75, "stopped (SIGTERM): no checkpoint yet; re-run the same command to resume"),
        (SCRIPT, "", "INT", 600, 0, 130, "stopped (SIGINT): no checkpoint yet; re-run the same command to resume"),
        (SCRIPT, "", "TERM INT", 600, 60, 130, "ended at once"),
        (SCRIPT, "", "INT TERM", 600, 60, 75, "ended at once"),
        (SCRIPT, "", "TERM", 0.5, 60, 75, "ended now"),
        (BLOCKED, "", "INT", 0.5, 0, 130, "ended now"),
        (SCRIPT, "s3://bucket/runs", "INT", 600, 0, 130, "the store does not answer; re-run"),
    ],
)
def test_driver_ends_although_its_cleanup_its_main_thread_or_the_store_hangs(
    script: str, output: str, signals: str, end: float, hold: float, status: int, message: str, tmp_path: Path
) -> None:
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
