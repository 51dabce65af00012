"""Evaluation during training changes no loss, and gives the metrics that the checkpoint gives afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.short_run import journal, losses, train_short, without_mlflow

STEPS, EVERY = 6, 2


def _both_runs(folder: str, zero_stage: int) -> None:
    """Train without and with evaluation: twelve images in batches of five, so the ranks have unequal batches."""
    without_mlflow()
    shared: dict[str, Any] = {
        "engine__zero_stage": zero_stage,
        "sources": {
            "scenes": {"shards": f"{folder}/scenes", "synthetic": {"scenes": 60, "image_size": 24}},
            "unseen": {"shards": f"{folder}/unseen", "synthetic": {"scenes": 13, "image_size": 24, "seed": 9}},
        },
        "stages": [
            {
                "name": "pairs",
                "sources": {"scenes": 1.0},
                "objectives": {"itc": {}, "mlm": {}},
                "steps": STEPS,
                "global_batch_size": 8,
                "optimizer": {"lr": 1e-3, "warmup_steps": 1},
            }
        ],
    }
    train_short(folder, "plain", **shared, checkpoint__every=EVERY)
    best = {"metric": "eval/unseen/i2t_mean_rank", "mode": "min"}
    train_short(
        folder,
        "evaluating",
        **shared,
        evaluation={"source": "unseen", "every": EVERY, "max_images_during_training": 12, "batch_size": 5},
        checkpoint={"every": EVERY, "keep": 1, "keep_best": best},
    )


# At ZeRO 3 every forward gathers weights from all ranks: what disturbs nothing there does so nowhere.
@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_evaluation_changes_no_loss(tmp_path: Path, zero_stage: int) -> None:
    run_ranks(_both_runs, 2, str(tmp_path), zero_stage)
    assert losses(tmp_path, "evaluating") == losses(tmp_path, "plain")
    assert len(losses(tmp_path, "plain")) == STEPS
    points = [record for record in journal(tmp_path, "evaluating") if record["kind"] == "metrics"]
    metrics = {record["step"]: record["values"] for record in points if "eval/unseen/i2t_r1" in record["values"]}
    assert list(metrics) == [2, 4]  # the end of the last stage is evaluated whole, afterwards
    assert {"eval/unseen/t2i_mean_rank", "eval/unseen/mlm_accuracy"} <= metrics[4].keys()
    seconds = [record["values"]["time/evaluation_s"] for record in points if "time/evaluation_s" in record["values"]]
    assert seconds[0] == 0 < seconds[-1]
    _assert_equal_to_checkpoint(tmp_path, metrics)


def _assert_equal_to_checkpoint(folder: Path, metrics: dict[int, dict[str, float]]) -> None:
    """Evaluate the checkpoint of a step with `mome evaluate` and compare."""
    from jobs.evaluate import evaluate_checkpoint

    kept = {
        int(folder_of_step.name[5:13]): folder_of_step
        for folder_of_step in (folder / "evaluating" / "checkpoints").iterdir()
    }
    ranks = {step: values["eval/unseen/i2t_mean_rank"] for step, values in metrics.items()}
    assert set(kept) == {4, min(ranks, key=lambda step: (ranks[step], -step))}, "the last, and the best by evaluation"
    result = evaluate_checkpoint(str(kept[4]), limit=12, track=False, report=folder / "r.html", rerank_best=0)
    assert result is not None
    assert result["retrieval"]["image_to_text"]["mean_rank"] == round(ranks[4], 2)
    assert result["mlm"]["accuracy"] == round(metrics[4]["eval/unseen/mlm_accuracy"], 6)
