"""A run that evaluates on its way trains exactly as one that does not, and what it finds is what a checkpoint gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from short_run import STEPS, journal, losses, train_short, without_mlflow

EVERY = 3
LONG = pytest.mark.skipif(not os.environ.get("MOME_LONG_RUNS"), reason="minutes: set MOME_LONG_RUNS=1")
HELD_OUT = {"shards": "", "synthetic": {"scenes": 13, "image_size": 24, "exclude": "scenes", "captions": 2}}


def _both_runs(folder: str, zero_stage: int) -> None:
    """Thirteen pictures in batches of four: two ranks have two each, and the last is not full."""
    without_mlflow()
    scenes = {"shards": f"{folder}/scenes", "synthetic": {"scenes": 60, "image_size": 24}}
    sources = {
        "scenes": scenes,
        "pictures": {"shards": f"{folder}/scenes", "use": "images"},
        "unseen": {**HELD_OUT, "shards": f"{folder}/unseen"},
    }
    shared: dict[str, Any] = {"engine__zero_stage": zero_stage, "engine__check_graph_every": 1, "sources": sources}
    train_short(folder, "plain", **shared)
    best = {"metric": "eval/unseen/i2t_mean_rank", "mode": "min"}
    train_short(
        folder,
        "evaluating",
        **shared,
        evaluation={"source": "unseen", "every": EVERY, "limit_during": 12, "batch": 4},
        checkpoint={"every": EVERY, "keep": 1, "keep_best": best},
    )


def _evaluations(folder: Path) -> dict[int, dict[str, float]]:
    records = [r for r in journal(folder, "evaluating") if r["kind"] == "metrics"]
    return {r["step"]: r["values"] for r in records if any(name.startswith("eval/unseen/") for name in r["values"])}


# At ZeRO 3 every forward gathers weights from all ranks; the others are a matter of minutes more, and no other path.
@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=LONG), pytest.param(2, marks=LONG), 3])
def test_the_losses_are_those_of_a_run_that_never_evaluates(tmp_path: Path, zero_stage: int) -> None:
    run_ranks(_both_runs, 2, str(tmp_path), zero_stage)
    assert losses(tmp_path, "evaluating") == losses(tmp_path, "plain")
    assert len(losses(tmp_path, "plain")) == 2 * STEPS
    found = _evaluations(tmp_path)
    assert list(found) == [3, 6, 8, 11, 14]  # every third step of each stage, and the end of the first
    assert "eval/unseen/reconstruction_error" in found[3]
    assert {"eval/unseen/i2t_r1", "eval/unseen/t2i_mean_rank", "eval/unseen/mlm_accuracy"} <= found[11].keys()
    time = [r["values"] for r in journal(tmp_path, "evaluating") if "time/evaluation_s" in r.get("values", {})][-1]
    assert time["time/evaluation_s"] > 0
    _equals_what_the_checkpoint_gives(tmp_path, found)


def _equals_what_the_checkpoint_gives(folder: Path, found: dict[int, dict[str, float]]) -> None:
    """`mome evaluate` of a step's checkpoint reads the same weights later, alone."""
    from jobs.evaluate import evaluate_checkpoint

    steps = {int(each.name[5:13]): each for each in (folder / "evaluating" / "checkpoints").iterdir()}
    assert 14 in steps, "the last checkpoint stays, and the best by what evaluation found"
    result = evaluate_checkpoint(str(steps[14]), limit=12, track=False, report=folder / "r.html", rerank_best=0)
    assert result is not None
    assert result["retrieval"]["image_to_text"]["mean_rank"] == round(found[14]["eval/unseen/i2t_mean_rank"], 2)
    assert result["mlm"]["accuracy"] == round(found[14]["eval/unseen/mlm_accuracy"], 6)
