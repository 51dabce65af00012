"""A preemption signal on any rank: all ranks save at the same step, end, and lose no step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.short_run import STEPS, BeforeStep, losses, short_config, train_short, without_mlflow

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
CASES = {  # name -> kind of signal, receiving rank, and step in which it arrives
    "in-the-middle": ("SIGTERM", 1, 4),
    "in-the-first-step": ("SIGUSR1", 0, 0),
    "in-the-last-step-of-a-stage": ("callable", 1, STEPS - 1),
}


def _preempt(folder: str, name: str, how: str, rank: int, step: int) -> dict[str, Any]:
    """Train until one rank receives a preemption signal in the middle of a step."""
    from pipeline.config.errors import Preempted
    from pipeline.training.loop import train

    told = False

    def act(_: object) -> None:
        nonlocal told
        if os.environ["RANK"] == str(rank):
            if how == "callable":
                told = True
            else:
                os.kill(os.getpid(), signal.Signals[how])

    handlers = [signal.getsignal(number) for number in SIGNALS]
    config = short_config(folder, name)
    with pytest.raises(Preempted) as caught:
        train(config, lambda progress: None, preempted=lambda: told, callbacks=[BeforeStep(step, act)])
    return {
        "told": str(caught.value),
        "status": caught.value.exit_status,
        "handlers": [signal.getsignal(number) for number in SIGNALS] == handlers,
        "steps": max(losses(folder, name)),
        "committed": sorted(file.parent.name for file in Path(folder, name).glob("*/*/COMMIT.json")),
    }


def _scenarios(folder: str) -> dict[str, dict[str, Any]]:
    without_mlflow()
    train_short(folder, "whole")
    found = {}
    for name, (how, rank, step) in CASES.items():
        found[name] = _preempt(folder, name, how, rank, step)
        train_short(folder, name)
    return found


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, dict[str, Any]]]]:
    folder = str(tmp_path_factory.mktemp("runs"))
    return folder, run_ranks(_scenarios, 2, folder)


@pytest.mark.parametrize("name", CASES)
def test_preempted_run_is_saved_at_once_on_all_ranks(scenarios: Any, name: str) -> None:
    step = CASES[name][2]
    for rank in scenarios[1]:
        found = rank[name]
        assert "Re-run the same command" in found["told"]
        assert found["status"] == 75
        assert found["handlers"], "the handlers of before are back"
        assert found["steps"] == step + 1, "the step was finished and no other was started"
        last = "0-vision" if step + 1 == STEPS else f"step-{step + 1:08d}"
        assert any(name.startswith(last) for name in found["committed"])


@pytest.mark.parametrize("name", CASES)
def test_resumed_losses_equal_the_uninterrupted_run(scenarios: Any, name: str) -> None:
    folder = scenarios[0]
    assert len(losses(folder, "whole")) == 2 * STEPS
    assert losses(folder, name) == losses(folder, "whole")
