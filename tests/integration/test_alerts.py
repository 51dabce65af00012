"""Alerts of a run on two ranks: each is a tag on its stage's run and a line in the log, and the run goes on."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.alerts import READINGS
from tests.support.ranks import run_ranks
from tests.support.short_run import STEPS, journal, short_config, without_mlflow

OBJECTIVES = {"itc": {}, "itm": {}}


def _troubled(folder: str) -> list[str]:
    """A head that calls every pair matched, a contrast at its clamp, a slow rank, a slow store; what was logged."""
    from pipeline.data.loading.backends import ThreadBackend
    from pipeline.training import loop, trainer
    from pipeline.training.deepspeed_engine import DeepSpeedEngine

    class SlowBackend(ThreadBackend):
        def result(self, step: int) -> Any:
            time.sleep(0.1)
            return super().result(step)

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    without_mlflow()
    build, call = trainer.build_stage_model, DeepSpeedEngine.__call__

    def spoilt(*arguments: Any) -> Any:
        model = build(*arguments)
        with torch.no_grad():
            model.itm_head.classify.bias.copy_(torch.tensor([-50.0, 50.0]))  # type: ignore[union-attr, operator]
            for name, parameter in model.named_parameters():
                if "log_scale" in name:
                    parameter.fill_(10.0)
        return model

    def slow(engine: Any, passes: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(0.2)
        return call(engine, passes)

    trainer.build_stage_model, DeepSpeedEngine.__call__ = spoilt, slow  # type: ignore[assignment, method-assign]
    logging.getLogger("pipeline.training.alerts").addHandler(Lines())
    try:
        stages = {"stages.pairs.objectives": OBJECTIVES, "stages.pairs.global_batch_size": 8}
        config = short_config(folder, data__lanes=8, **stages)
        loop.train(config, lambda progress: None, loader_backend=SlowBackend)
    finally:
        trainer.build_stage_model, DeepSpeedEngine.__call__ = build, call  # type: ignore[method-assign]
    return lines


def test_a_troubled_run_says_so_in_tags_and_in_its_log_and_goes_on(tmp_path: Path) -> None:
    first, second = run_ranks(_troubled, 2, str(tmp_path))
    records = journal(tmp_path)
    tags = {r["key"]: r["value"] for r in records if r["kind"] == "tag" and r["stage"] == 1}
    names = ["itm_collapse", "itc_clamp", "loader_starved", "ranks_out_of_step"]
    assert [name for name in names if f"mome.alert.{name}" not in tags] == []
    assert "rank 1 needs" in tags["mome.alert.ranks_out_of_step"]
    assert tags["mome.alert.itm_collapse"].startswith(f"since step {STEPS + 1 + READINGS}: matching is right for 100%")
    assert sum("stage pairs: ALERT" in line for line in first) == len(names)
    assert second == [], "one rank speaks for all"
    assert records[-1]["kind"] == "run_end"
    assert records[-1]["status"] == "FINISHED"
