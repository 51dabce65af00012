"""Alerts of a run on two ranks: each is a tag on its stage's run and a log line, and the run continues."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.alerts import CONSECUTIVE
from pipeline.training.callbacks import Callback
from tests.support.ranks import run_ranks
from tests.support.short_run import STEPS, journal, short_config, without_mlflow

OBJECTIVES = {"itc": {}, "itm": {}}
PREFIX = f"since step {STEPS + 1 + CONSECUTIVE}: image-text matching is right for 100%"


class Trouble(Callback):
    """Callback that makes ITM predict "matched" always, the temperature reach its clamp, and rank 1's forward slow."""

    def on_model_built(self, model: Any) -> None:
        with torch.no_grad():
            model.itm_head.classify.bias.copy_(torch.tensor([-50.0, 50.0]))
            for name, parameter in model.named_parameters():
                if "log_scale" in name:
                    parameter.fill_(10.0)
        if dist.get_rank() == 1:
            model.register_forward_pre_hook(lambda module, arguments: time.sleep(0.2))


def _troubled(folder: str) -> list[str]:
    """Train with `Trouble` and slow data; return the logged alerts."""
    from pipeline.data.loading.worker import ThreadBackend
    from pipeline.training.loop import train

    class SlowBackend(ThreadBackend):
        def result(self, step: int) -> Any:
            time.sleep(0.1)
            return super().result(step)

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    without_mlflow()
    logging.getLogger("pipeline.training.alerts").addHandler(Lines())
    stages = {"stages.pairs.objectives": OBJECTIVES, "stages.pairs.global_batch_size": 8}
    config = short_config(folder, data__streams=8, **stages)
    train(config, lambda progress: None, loader_backend=SlowBackend, callbacks=[Trouble()])
    return lines


def test_alerts_are_tagged_and_logged_and_the_run_continues(tmp_path: Path) -> None:
    first, second = run_ranks(_troubled, 2, str(tmp_path))
    records = journal(tmp_path)
    tags = {r["key"]: r["value"] for r in records if r["kind"] == "tag" and r["stage"] == 1}
    names = ["itm_collapse", "itc_clamp", "data_starvation", "straggler"]
    assert [name for name in names if f"mome.alert.{name}" not in tags] == []
    assert "rank 1 needs" in tags["mome.alert.straggler"]
    assert tags["mome.alert.itm_collapse"].startswith(PREFIX)
    assert sum("stage pairs: ALERT" in line for line in first) == len(names)
    assert second == [], "rank 0 alone raises alerts"
    assert records[-1]["kind"] == "run_end"
    assert records[-1]["status"] == "FINISHED"
