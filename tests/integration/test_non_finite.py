"""A non-finite value stops the run before the update, naming the module and rank where it began."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from pipeline.training.callbacks import Callback
from tests.support.ranks import run_ranks
from tests.support.short_run import train_short, without_mlflow

STEP = 2


class Spoiler(Callback):
    """Callback that makes rank 1 produce non-finite values in step `STEP` and compares the weights before and after."""

    def __init__(self, kind: str):
        self._kind = kind
        self.is_unchanged = False

    def on_stage_start(self, state: Any, start: int) -> None:
        self._engine = state.engine

    def before_step(self, step: int, batch: Any) -> None:
        if step != STEP:
            return
        if os.environ["RANK"] == "1":
            module = self._engine.module.get_submodule("blocks.1.attention")
            if self._kind == "output":
                module.register_forward_hook(lambda m, i, output: output * float("inf"))
            else:  # the forward stays finite
                module.register_forward_hook(lambda m, i, output: _Spoilt.apply(output))
        self._before = [fragment.values["weight"].clone() for fragment in self._engine.fragments()]

    def on_fault(self, step: int, name: str, message: str) -> None:
        after = [fragment.values["weight"] for fragment in self._engine.fragments()]
        self.is_unchanged = all(torch.equal(a, b) for a, b in zip(self._before, after, strict=True))


def _spoil(folder: str, kind: str, zero_stage: int, precision: str = "float32") -> dict[str, Any]:
    """Return the run's error and whether its weights are those before the step."""
    from pipeline.config.errors import RunFailed

    spoiler = Spoiler(kind)
    with pytest.raises(RunFailed) as caught:
        train_short(
            folder,
            f"{kind}-{zero_stage}-{precision}",
            callbacks=[spoiler],
            engine__zero_stage=zero_stage,
            engine__precision=precision,
        )
    return {"message": str(caught.value), "is_unchanged": spoiler.is_unchanged}


class _Spoilt(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


CASES = [("output", 2, "float32"), ("gradient", 2, "float32"), ("output", 3, "bfloat16"), ("gradient", 3, "bfloat16"),
         ("gradient", 0, "float32"), ("gradient", 1, "bfloat16")]  # fmt: skip


def _scenarios(folder: str) -> dict[tuple[str, int, str], dict[str, Any]]:
    without_mlflow()
    return {case: _spoil(folder, *case) for case in CASES}


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int, str], dict[str, Any]]]:
    return run_ranks(_scenarios, 2, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_non_finite_value_stops_the_run_before_the_update(scenarios: Any, case: Any) -> None:
    for result in (rank[case] for rank in scenarios):
        assert f"step {STEP}: " in result["message"]
        assert "on rank 1, in the " + ("forward" if case[0] == "output" else "backward") in result["message"]
        assert "module 'blocks.1.attention" in result["message"]
        assert ("is nan on rank 1" in result["message"]) == (case[0] == "output")
        assert "weights were not updated" in result["message"]
        assert result["is_unchanged"]
