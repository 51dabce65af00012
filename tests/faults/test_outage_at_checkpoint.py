"""The object store is unavailable when a checkpoint is due: the run equals the undisturbed one."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.ranks import SECONDS, start_ranks
from tests.support.short_run import STEPS, BeforeStep, short_config, without_mlflow

OUTAGE = float(os.environ.get("MOME_OUTAGE_SECONDS", "5"))  # minutes in the long version; less in integration
HANG = max(20.0, OUTAGE / 3)  # limit of a step; the long version needs more


def _train(folder: str, output: str, storage: dict[str, Any]) -> None:
    """Train on this rank; request the outage before the step after which the first checkpoint is written."""
    from pipeline.data.storage.retry import RetryBudget
    from pipeline.training.loop import train

    without_mlflow()
    wait = RetryBudget.wait

    def note(self: RetryBudget, error: Exception) -> None:
        with Path(folder, "tried-again").open("a", encoding="utf-8") as file:
            file.write(f"{self.url}\n")
        wait(self, error)

    RetryBudget.wait = note  # type: ignore[method-assign]

    def ask(_: object) -> None:
        if not Path(folder, "away").exists():
            Path(folder, "asked").touch()
            while not Path(folder, "away").exists():
                time.sleep(0.02)

    config = short_config(
        folder, output=output, storage=storage, cluster__workers=1, guards__hang_seconds=HANG, guards__save_seconds=900
    )
    train(config, lambda progress: None, callbacks=[BeforeStep(2, ask)])


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_run_survives_an_outage_at_a_checkpoint(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data.storage import Storage

    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "cache"))
    with FaultProxy(s3.endpoint, seed=1) as proxy:
        settings = {"endpoint_url": proxy.endpoint, "retry_timeout_seconds": max(30.0, 3 * OUTAGE)}
        storage = s3.config.model_copy(update=settings).model_dump()
        (rank,) = start_ranks(_train, 1, str(tmp_path), s3.url("runs"), storage)
        deadline = time.monotonic() + SECONDS
        while not (tmp_path / "asked").exists() and rank.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        proxy.away(OUTAGE, after=0)
        (tmp_path / "away").touch()
        rank.join(SECONDS + 2 * OUTAGE)
        assert rank.exitcode == 0
    assert "/run/checkpoints/step-00000003." in (tmp_path / "tried-again").read_text(encoding="utf-8")
    plain = Storage(s3.config)
    for name in ("0-vision", "1-pairs"):
        assert plain.exists(s3.url("runs", "run", "stages", name, "COMMIT.json"))
    assert not plain.list(s3.url("runs", "run", "stacks"))
    saved = plain.list(s3.url("runs", "run", "checkpoints"))
    assert any(name.startswith(f"step-{2 * STEPS - 2:08d}.") for name in saved)
