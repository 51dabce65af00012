"""`mome train` with its own Ray saves when it receives a signal, prints how to resume, and resumes."""

import signal
import time
from pathlib import Path

import pytest

from tests.support.ray_nodes import raylets, wait_until
from tests.support.train_process import TrainProcess

STEPS = 60


def ended(run: TrainProcess) -> int:
    assert run.process is not None
    return run.process.wait(timeout=300)


@pytest.mark.slow
def test_stopped_driver_saves_and_resumes_without_losing_a_step(tmp_path: Path) -> None:
    run = TrainProcess(tmp_path, "run", STEPS, "checkpoint.every=1000").start()
    try:
        wait_until(lambda: run.step() >= 3 or not run.running(), "the first steps")
        assert run.process is not None
        run.process.send_signal(signal.SIGTERM)
        assert ended(run) == 75, run.log_text()
        (saved,) = run.saved_steps()
        assert f"stopped (SIGTERM): checkpoint at step {saved}; re-run the same command to resume" in run.log_text()
        assert run.step() == saved, "a step was made after the one that was saved"
        assert "Traceback" not in run.log_text()
        assert "***" not in run.log_text(), "a C++ stack"

        run.start()  # the second signal arrives while Ray starts
        time.sleep(15)
        run.process.send_signal(signal.SIGINT)
        assert ended(run) == 130, run.log_text()
        wait_until(lambda: "stopped (SIGINT)" in run.log_text(), "the last word", 5)
        assert f"step {saved}; re-run" in run.log_text().splitlines()[-2]
        assert "Traceback" not in run.log_text()
    finally:
        run.kill()


def test_missing_gpus_of_this_machine_are_reported_at_once(tmp_path: Path) -> None:
    run = TrainProcess(tmp_path, "here", 1, "cluster.gpus_per_worker=1").start()
    assert ended(run) == 1
    assert "2 ranks need 2 GPUs; this cluster has 0" in run.log_text()


@pytest.mark.slow
def test_missing_gpus_are_awaited_and_wrong_port_fails_fast(tmp_path: Path) -> None:
    with raylets([1, 1], dashboard=True) as cluster:
        keys = [f"cluster.address={cluster.address}", "cluster.gpus_per_worker=1", "cluster.start_seconds=5"]
        run = TrainProcess(tmp_path, "there", 1, *keys, environment=cluster.environment).start()
        assert ended(run) == 1
        assert "waiting: 0 of 2 workers placed; 2 GPUs requested, 0 in the cluster" in run.log_text()
        assert "this cluster has 0" in run.log_text().splitlines()[-1]

        began, address = time.monotonic(), f"127.0.0.1:{cluster.dashboard_port}"
        run = TrainProcess(tmp_path, "port", 1, f"cluster.address={address}", environment=cluster.environment).start()
        assert ended(run) == 1
        assert f"cluster.address {address}: no Ray cluster answers" in run.log_text()
        assert time.monotonic() - began < 120, "Ray alone would wait for four minutes"
