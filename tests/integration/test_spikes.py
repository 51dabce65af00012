"""A loss spike rolls back to the last checkpoint and skips its data, also after the run is killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.short_run import STEPS, journal, short_config, without_mlflow

SPIKED = 4  # the batch whose loss is planted; checkpoints hold 3 and 6 steps
SPIKE = {"factor": 3.0, "window": 2, "skip": 1, "max_rollbacks": 2}


class Killed(Exception):
    """Simulated end of the process, which the package must not catch."""


def _batches(folder: str, name: str, killed_at: int | None = None, planted: tuple[int, ...] = (SPIKED,)) -> list[int]:
    """Return the batches that stage 0 read, in order, until its end or until it reaches `killed_at`."""
    from pipeline.training.loop import train
    from pipeline.training.step import TrainingStep

    read: list[int] = []
    original = TrainingStep.__call__

    def call(self: Any, batch: Any, **asked: Any) -> Any:
        if self.stage.name != "vision":
            return original(self, batch, **asked)
        if batch.step == killed_at:
            raise Killed
        read.append(batch.step)
        losses = original(self, batch, **asked)
        if batch.step in planted:
            losses["loss"] = losses["loss"] * 100
        return losses

    TrainingStep.__call__ = call  # type: ignore[method-assign]
    try:
        train(short_config(folder, name, guards__spike=SPIKE), lambda progress: None)
    except Killed:
        pass
    finally:
        TrainingStep.__call__ = original  # type: ignore[method-assign]
    return read


def _scenarios(folder: str) -> dict[str, Any]:
    from pipeline.config.errors import RunFailed

    without_mlflow()
    found: dict[str, Any] = {"whole": _batches(folder, "whole")}
    # Killed before the next checkpoint (6 steps: batches 0 1 2 6 7 8) and after it.
    found["before"] = [_batches(folder, "before", 8), _batches(folder, "before")]
    found["after"] = [_batches(folder, "after", 10), _batches(folder, "after")]
    with pytest.raises(RunFailed) as caught:
        _batches(folder, "spiky", planted=tuple(range(SPIKED, 60)))
    found["told"] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("runs"))
    return folder, run_ranks(_scenarios, 2, folder)


PAST = [6, 7, 8, 9, 10]  # from the checkpoint of 3 steps on: without batches 3 to 5 (the spike's 4, and one more)


def test_stage_continues_past_the_spike_for_all_its_steps(scenarios: Any) -> None:
    for found in scenarios[1]:
        assert found["whole"] == [0, 1, 2, 3, 4, *PAST]
        assert len(PAST) == STEPS - 3


def test_resumed_run_skips_the_same_batches(scenarios: Any) -> None:
    for found in scenarios[1]:
        assert found["before"] == [[0, 1, 2, 3, 4, 6, 7], [3, 4, *PAST]]
        assert found["after"] == [[0, 1, 2, 3, 4, 6, 7, 8, 9], [9, 10]]


@pytest.mark.parametrize("name", ["before", "after"])
def test_resumed_run_ends_with_equal_weights(scenarios: Any, name: str) -> None:
    stage = Path("stages", "0-vision", "weights.safetensors")
    assert Path(scenarios[0], name, stage).read_bytes() == Path(scenarios[0], "whole", stage).read_bytes()


def test_rollback_is_tagged(scenarios: Any) -> None:
    tags = {r["key"]: r["value"] for r in journal(scenarios[0], "whole") if r["kind"] == "tag"}
    assert "back to step 3 without batches 3 to 5" in tags["mome.spike.1"]


def test_stage_fails_after_the_maximum_of_rollbacks(scenarios: Any) -> None:
    for found in scenarios[1]:
        assert "after 2 rollbacks; guards.spike.max_rollbacks allows no more" in found["told"]
