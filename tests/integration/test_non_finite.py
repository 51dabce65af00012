"""A number that is not finite stops the run before the update, and the module and rank it came from are named."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.short_run import BeforeStep, short_config, without_mlflow

STEP = 2


def _spoil(folder: str, kind: str, zero_stage: int, precision: str = "float32") -> dict[str, Any]:
    """What the run says, and whether its weights are those of before the step, when rank 1 is spoilt in step `STEP`."""
    from pipeline.config.errors import RunFailed
    from pipeline.training.loop import train
    from pipeline.training.stage_run import StageRun

    kept: dict[str, Any] = {}

    def act(training_step: Any) -> None:
        engine = training_step.engine
        if os.environ["RANK"] == "1":
            module = engine.module.get_submodule("blocks.1.attention")
            if kind == "output":
                module.register_forward_hook(lambda m, i, output: output * float("inf"))
            else:  # the forward pass stays finite
                module.register_forward_hook(lambda m, i, output: _Spoilt.apply(output))
        kept["engine"] = engine
        kept["before"] = [fragment.values["weight"].clone() for fragment in engine.fragments()]

    original = StageRun._look

    def look(self: Any, *arguments: Any) -> bool:
        try:
            return original(self, *arguments)
        except RunFailed:
            after = [fragment.values["weight"] for fragment in self.engine.fragments()]
            kept["same"] = all(torch.equal(a, b) for a, b in zip(kept["before"], after, strict=True))
            raise

    StageRun._look = look  # type: ignore[method-assign]
    name = f"{kind}-{zero_stage}-{precision}"
    changed = {"engine__zero_stage": zero_stage, "engine__precision": precision}
    try:
        with BeforeStep(STEP, act), pytest.raises(RunFailed) as caught:
            train(short_config(folder, name, **changed), lambda progress: None)
    finally:
        StageRun._look = original  # type: ignore[method-assign]
    return {"told": str(caught.value), "same": kept["same"]}


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
def test_the_first_module_and_its_rank_are_named_and_nothing_was_updated(scenarios: Any, case: Any) -> None:
    for found in (rank[case] for rank in scenarios):
        assert f"step {STEP}: " in found["told"]
        assert "on rank 1, in the " + ("forward" if case[0] == "output" else "backward") in found["told"]
        assert "module 'blocks.1.attention" in found["told"]
        assert ("is nan on rank 1" in found["told"]) == (case[0] == "output")
        assert "weights were not updated" in found["told"]
        assert found["same"]
