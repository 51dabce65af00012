"""Evaluation during training changes no loss and equals that of the checkpoint; ranks on Ray equal one process."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from jobs.evaluate import evaluate_checkpoint
from jobs.predict import embed
from tests.support.finished_run import untrained_weights
from tests.support.ranks import run_ranks
from tests.support.short_run import journal, losses, train_short

STEPS, EVERY = 6, 2


def _both_runs(folder: str, zero_stage: int) -> None:
    """Train without and with evaluation: twelve images in batches of five, so the ranks have unequal batches."""
    stage: dict[str, Any] = {"name": "pairs", "sources": {"scenes": 1.0}, "objectives": {"itc": {}, "mlm": {}}}
    stage |= {"steps": STEPS, "global_batch_size": 8, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}
    unseen = {"shards": f"{folder}/unseen", "synthetic": {"scenes": 13, "image_size": 24, "seed": 9}}
    shared: dict[str, Any] = {"engine__zero_stage": zero_stage, "sources__unseen": unseen, "stages": [stage]}
    train_short(folder, "plain", **shared, checkpoint__every=EVERY)
    evaluation = {"source": "unseen", "every": EVERY, "max_images_during_training": 12, "batch_size": 5}
    best = {"metric": "eval/unseen/i2t_mean_rank", "mode": "min"}
    checkpoint = {"every": EVERY, "keep": 1, "keep_best": best}
    train_short(folder, "evaluating", **shared, evaluation=evaluation, checkpoint=checkpoint)


# At ZeRO 3 every forward gathers weights from all ranks: what disturbs nothing there does so nowhere.
@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_evaluation_changes_no_loss_and_equals_that_of_the_checkpoint(tmp_path: Path, zero_stage: int) -> None:
    run_ranks(_both_runs, 2, str(tmp_path), zero_stage)
    assert losses(tmp_path, "evaluating") == losses(tmp_path, "plain")
    assert len(losses(tmp_path, "plain")) == STEPS
    points = [record for record in journal(tmp_path, "evaluating") if record["kind"] == "metrics"]
    metrics = {record["step"]: record["values"] for record in points if "eval/unseen/i2t_r1" in record["values"]}
    assert list(metrics) == [2, 4]  # the end of the last stage is evaluated whole, afterwards
    assert {"eval/unseen/t2i_mean_rank", "eval/unseen/mlm_accuracy"} <= metrics[4].keys()
    seconds = [record["values"]["time/evaluation_s"] for record in points if "time/evaluation_s" in record["values"]]
    assert seconds[0] == 0 < seconds[-1]

    kept = {int(path.name[5:13]): path for path in (tmp_path / "evaluating" / "checkpoints").iterdir()}
    ranks = {step: values["eval/unseen/i2t_mean_rank"] for step, values in metrics.items()}
    assert set(kept) == {4, min(ranks, key=lambda step: (ranks[step], -step))}, "the last, and the best by evaluation"
    result = evaluate_checkpoint(str(kept[4]), limit=12, track=False, report=tmp_path / "r.html", rerank_best=0)
    assert result is not None
    assert result["retrieval"]["image_to_text"]["mean_rank"] == round(ranks[4], 6)
    assert result["mlm"]["accuracy"] == round(metrics[4]["eval/unseen/mlm_accuracy"], 6)


@pytest.mark.slow
def test_evaluation_and_embedding_on_ray_equal_one_process(tmp_path: Path) -> None:
    config, url = untrained_weights(tmp_path)
    report = tmp_path / "report.html"
    alone = evaluate_checkpoint(url, track=False, report=report)
    page = report.read_bytes()
    assert evaluate_checkpoint(url, track=False, report=report, workers=2) == alone
    assert alone is not None
    assert (alone["pairs"], alone["trained_on"]) == (22, ["vision", "pairs"])
    assert report.read_bytes().count(b"<img") == page.count(b"<img")
    shards = config.sources["scenes"].shards
    one, two = (embed(shards, url, str(tmp_path / f"{workers}"), workers) for workers in (None, 2))
    assert one is not None
    assert two == {**one, "out": str(tmp_path / "2")}
    files = sorted(file.name for file in (tmp_path / "None").glob("*.parquet"))
    assert files
    for name in files:
        assert parquet.read_table(tmp_path / "None" / name) == parquet.read_table(tmp_path / "2" / name)
