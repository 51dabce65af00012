"""Processes of a run: its time account, whose writes never block it; its owner; node statistics; extension builds."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from jobs.distributed import ProgressFile
from pipeline.config.errors import ConfigError, StorageError, Superseded
from pipeline.data.storage import Storage
from pipeline.training import goodput, loop
from pipeline.training.callbacks import Progress
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import FOLDER, exclusive_build, use_own_folder
from pipeline.training.goodput import PHASES, GoodputTracker, add_time, read_record
from pipeline.training.ownership import CLAIM_VARIABLE, OWNER_FILE, Ownership, main
from pipeline.training.supervisor import NodeMonitor
from tests.support.ranks import run_ranks
from tests.support.short_run import DEMO, short_config

Seconds = dict[str, float]
# Seconds since the last heartbeat, and (besides 10 of startup) of the heartbeat, the checkpoint and after the restart.
RESTARTS: dict[str, tuple[float, Seconds, Seconds | None, Seconds]] = {
    "work after the checkpoint is lost": (
        30, {"training": 82, "data_wait": 6, "checkpoint": 2}, {"training": 50, "data_wait": 5, "checkpoint": 1},
        {"training": 50, "data_wait": 5, "checkpoint": 2, "lost_work": 33, "restart": 30},
    ),
    "killed before its first step": (
        10, {"training": 50, "lost_work": 33, "restart": 107}, {"training": 50},
        {"training": 50, "lost_work": 33, "restart": 117},
    ),
    "checkpoint newer than the heartbeat": (
        40, {"training": 10}, {"training": 30, "checkpoint": 1}, {"training": 30, "checkpoint": 1, "restart": 19}
    ),
    "lost work is in the checkpoint and in the heartbeat": (
        0, {"training": 60, "lost_work": 30}, {"training": 50, "lost_work": 40}, {"training": 50, "lost_work": 40}
    ),
    "without a checkpoint": (0, {"training": 40}, {}, {"lost_work": 40}),
    "extended after its end": (9999, {"training": 40}, None, {"training": 40}),
}  # fmt: skip


@pytest.mark.parametrize("case", RESTARTS)
def test_time_after_the_checkpoint_is_lost_work_then_restart(tmp_path: Path, case: str) -> None:
    down, recorded, saved, expected = RESTARTS[case]
    seconds = dict.fromkeys(PHASES, 0.0) | {"startup": 10} | recorded
    record = {"at": time.time() - down, "seconds": seconds, "restarts": 0, "ended": saved is None}
    (tmp_path / "time.json").write_text(json.dumps(record), encoding="utf-8")
    tracker = GoodputTracker(Storage(), str(tmp_path), is_writer=True)
    if saved is not None:
        tracker.resume_from(saved and saved | {"startup": 10})
    account = {phase: round(value) for phase, value in tracker.seconds().items() if round(value)}
    assert account == expected | {"startup": 10}
    assert sum(tracker.seconds().values()) == pytest.approx(sum(account.values()), abs=0.5)
    assert tracker.restarts == (saved is not None)


def test_time_of_the_phase_entered_last_and_of_evaluation_is_saved_in_the_run(tmp_path: Path) -> None:
    storage, folder, begin = Storage(), str(tmp_path), time.monotonic()
    assert read_record(storage, folder) is None
    tracker = GoodputTracker(storage, folder, is_writer=True)
    tracker.start()
    for phase, pause in (("training", 0.4), ("data_wait", 0.2)):
        tracker.enter(phase)
        time.sleep(pause)
    tracker.close(ended=True)
    with add_time(storage, folder, "evaluation"):
        time.sleep(0.1)
    record = read_record(storage, folder) or pytest.fail("no record was saved")
    seconds = record["seconds"]
    assert record["ended"]
    for phase, shortest in (("training", 0.4), ("data_wait", 0.2), ("evaluation", 0.1)):
        assert seconds[phase] >= shortest
    assert seconds["training"] + seconds["data_wait"] + seconds["evaluation"] <= time.monotonic() - begin
    (tmp_path / "time.json").write_text("{", encoding="utf-8")
    assert read_record(storage, folder) is None, "a damaged record counts as none"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace `Storage.write` by one that waits for `back`, and then raises `fault`, if any, or keeps the data."""
    store = Mock(back=threading.Event(), reached=threading.Event(), written=[], fault=None)

    def write(_: Storage, url: str, data: bytes) -> None:
        store.reached.set()
        assert store.back.wait(30)
        if store.fault is not None:
            raise store.fault
        store.written.append(json.loads(data))

    monkeypatch.setattr(Storage, "write", write)
    yield store
    store.back.set()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("mome-")]:
        thread.join(10)  # a write that was given up continues in the background


@pytest.mark.parametrize("is_available", [False, True])
def test_unavailable_store_or_a_new_owner_ends_the_account(store, monkeypatch, caplog, is_available: bool) -> None:
    monkeypatch.setattr(goodput, "CLOSE_SECONDS", 10.0 if is_available else 0.05)
    tracker = GoodputTracker(Storage(), "memory://run", is_writer=True)
    if is_available:
        store.back.set()
    tracker.start()
    assert store.reached.wait(10)
    tracker.close(ended=not is_available, write=not is_available)
    assert len(store.written) == is_available, "only the first heartbeat, whose write had begun"
    assert ("time.json was not written within" in caplog.text) != is_available


def test_write_errors_are_logged_and_only_new_progress_is_written(store: Any, caplog: Any) -> None:
    store.back.set()
    for store.fault in (StorageError("away"), ValueError("no URL"), MemoryError()):
        goodput = GoodputTracker(Storage(), "memory://run", is_writer=True)
        goodput.start()
        goodput.close(ended=True)
        assert f"time.json was not written: {type(store.fault).__name__}" in caplog.text
    progress = ProgressFile(Mock(folder="memory://run"), Storage())
    first = Progress("pairs", 1, 9, 1, 9, loss=2.0, samples_per_second=1.0, seconds_left=8.0)
    progress(first)
    progress._write()  # fails
    store.fault = None
    progress.start()
    for step in (2, 3):
        progress(replace(first, step=step))
    progress.stop()
    assert [record["step"] for record in store.written] == [3]


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_only_a_finished_run_waits_for_its_record_to_be_closed(monkeypatch, caplog, status) -> None:
    monkeypatch.setattr(loop, "CLOSE_SECONDS", 0.05)
    closed = threading.Event()
    loop._close_tracker(Mock(close=lambda: time.sleep(0.3) or closed.set()), status)  # type: ignore[func-returns-value]
    assert closed.is_set() == ("not closed within" not in caplog.text) == (status == "FINISHED")


# ---- the owner of a run
take = partial(Ownership.take, Storage())


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_latest_start_owns_the_run_and_a_superseded_launcher_does_not_retake_it(folder: str) -> None:
    assert Ownership(Storage(), folder, "of a run that was never started").holds()
    starts = [take(folder, "launcher") for _ in range(12)]
    assert [start.holds() for start in starts] == [False] * 11 + [True]
    assert sorted(start.start for start in starts if start.start) == [start.start for start in starts]
    assert Ownership(Storage(), folder, "launcher").holds(), "the launcher has it, whichever start of its ranks does"
    old, new = take(folder), take(folder)
    assert (old.holds(), new.holds()) == (False, True), "a manual launch always takes the run"
    assert old.claim != new.claim
    with pytest.raises(Superseded, match=f"owned by a later start, on .*/{OWNER_FILE}/"):
        take(folder, "launcher")
    new.check()
    assert not Ownership(Storage(), folder, "launcher").holds()
    assert take(folder, new.claim).holds()


def test_launcher_is_identified_by_the_name_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, command = short_config(str(tmp_path)).folder, [str(DEMO), f"output={tmp_path}", "name=run"]
    monkeypatch.setenv(CLAIM_VARIABLE, "slurm-17-0")
    assert main(command) == 0, "the launcher has not started yet"
    take(folder, "of a run before it")
    assert main(command) == 0, "the launcher has not started yet and may take the run"
    first, again = take(folder), take(folder)
    assert first.claim == again.claim
    assert main(command) == 0
    monkeypatch.setenv(CLAIM_VARIABLE, "slurm-18-0")
    take(folder)
    monkeypatch.setenv(CLAIM_VARIABLE, "slurm-17-0")
    with pytest.raises(Superseded, match=f"start it again with another {CLAIM_VARIABLE}"):
        take(folder)
    assert main(command) == Superseded.exit_status
    monkeypatch.delenv(CLAIM_VARIABLE)
    assert main(command) == 0


def test_ranks_restarted_by_torchrun_share_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are children of one agent, here this process, whose own parent is another one with an equal run id."""
    monkeypatch.delenv(CLAIM_VARIABLE, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    code = "from pipeline.training import ownership; print(ownership._claim_of_launcher())"
    first, again = (subprocess.check_output([sys.executable, "-c", code], text=True).strip() for _ in range(2))
    assert first == again != take(str(tmp_path)).claim


def test_one_of_two_simultaneous_starts_owns_the_run(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, others = Ownership._starts, list[Any]()

    def interleaved(ownership: Ownership) -> list[Any]:
        """Let the other start begin and end when this one has read which starts there are."""
        before = starts(ownership)
        if not others:
            others[:] = [None]
            others[:] = [take(folder, "another")]
        return before

    monkeypatch.setattr(Ownership, "_starts", interleaved)
    try:
        is_owner = take(folder, "one").holds()
    except Superseded:
        is_owner = False
    assert others[0].holds() != is_owner


# ---- nodes
def watch(nodes: int) -> dict[str, float]:
    """Run each rank as a node of its own; return the metrics rank 0 takes once all nodes have reported."""
    collectives, taken, deadline = Collectives(), dict[str, float](), time.monotonic() + 60
    monitor = NodeMonitor(collectives, seconds=0.1, name="host")
    monitor.start()
    while collectives.rank == 0 and time.monotonic() < deadline and len({key.split("/")[1] for key in taken}) < nodes:
        time.sleep(0.05)
        taken |= monitor.newest.pop() if monitor.newest else {}
    collectives.barrier()
    monitor.stop()
    return taken


def test_rank_0_collects_statistics_of_every_node() -> None:
    taken, nothing = run_ranks(watch, 2, 2)
    assert nothing == {}
    everywhere = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"}
    everywhere |= {f"disk_{amount}" for amount in ("usage_percentage", "usage_megabytes", "available_megabytes")}
    for node in ("host", "host-1"):  # the same name is distinguished by rank
        assert {key.split("/")[2] for key in taken if key.startswith(f"system/{node}/")} >= everywhere
        assert 0 < taken[f"system/{node}/system_memory_usage_percentage"] < 100


# ---- DeepSpeed's extensions, built by one process at a time in a folder of their own
HOLDER = """
import sys, time
from pathlib import Path
from pipeline.training.deepspeed_engine import exclusive_build
with exclusive_build(Path(sys.argv[1])):
    Path(sys.argv[1], "op").mkdir(exist_ok=True)
    Path(sys.argv[1], "op", "lock").touch()
    print("inside", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_process_killed_while_building_leaves_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen([*command, "600"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "inside\n"  # type: ignore[union-attr]
    waiter = subprocess.Popen([*command, "0"])
    time.sleep(3)
    assert waiter.poll() is None, "two processes build at once"
    holder.kill()
    holder.wait()
    assert waiter.wait(timeout=60) == 0
    with exclusive_build(tmp_path):
        assert not (tmp_path / "op" / "lock").exists()


def test_ninja_and_folder_are_those_of_the_installation_or_the_user(tmp_path, monkeypatch) -> None:
    scripts, folders = str(Path(sys.executable).parent), set[Path]()
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert use_own_folder() == use_own_folder() == tmp_path
    assert os.environ["PATH"].split(os.pathsep) == [scripts, "/usr/bin", "/bin"]
    assert shutil.which("ninja") == f"{scripts}/ninja"
    for origin in ("/here/deepspeed/__init__.py", "/there/deepspeed/__init__.py"):
        monkeypatch.delenv(FOLDER)
        monkeypatch.setattr(importlib.util, "find_spec", Mock(return_value=Mock(origin=origin)))
        folders.add(use_own_folder())
    assert len(folders) == 2
    assert all("mome-py" in folder.name for folder in folders)


def test_folder_without_write_access_or_file_locks_is_reported(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="TORCH_EXTENSIONS_DIR"), exclusive_build(tmp_path / "file" / "extensions"):
        pass
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, "No locks available")))
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "lock").touch()
    with exclusive_build(tmp_path):
        assert (tmp_path / "op" / "lock").exists(), "whose it is cannot be known"
    assert "cannot be locked" in caplog.text
