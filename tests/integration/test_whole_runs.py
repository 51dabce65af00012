"""Whole runs: trained, evaluated meanwhile and afterwards, embedded, exported and asked for predictions."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from jobs.configs import Caller
from jobs.convert import export_weights, import_weights
from jobs.evaluate import evaluate_checkpoint
from jobs.predict import embed, predict
from pipeline.config.errors import ConfigError
from pipeline.data.contents.choices import ANSWERS, Choices
from pipeline.data.storage import Storage
from pipeline.evaluation.ranks import SINGLE_PROCESS
from pipeline.training.checkpoint.weights import load_weights
from pipeline.training.collectives import Collectives
from pipeline.training.loop import train
from tests.support.fine_tuning_data import COLOURS, image_of_sides, run_config, write_image
from tests.support.finished_run import untrained_weights
from tests.support.ranks import run_ranks
from tests.support.short_run import journal, losses, train_short
from tests.support.train_process import run_module

OPTIMIZER = {"lr": 1e-3, "warmup_steps": 1}


def _both_runs(folder: str, zero_stage: int) -> None:
    """Train without and with evaluation: twelve images in batches of five, so the ranks have unequal batches."""
    stage: dict[str, Any] = {"name": "pairs", "sources": {"scenes": 1.0}, "objectives": {"itc": {}, "mlm": {}}}
    stage |= {"steps": 6, "global_batch_size": 8, "optimizer": OPTIMIZER}
    unseen = {"shards": f"{folder}/unseen", "synthetic": {"scenes": 13, "image_size": 24, "seed": 9}}
    shared: dict[str, Any] = {"engine__zero_stage": zero_stage, "sources__unseen": unseen, "stages": [stage]}
    train_short(folder, "plain", **shared, checkpoint__every=2)
    evaluation = {"source": "unseen", "every": 2, "max_images_during_training": 12, "batch_size": 5}
    best = {"metric": "eval/unseen/i2t_mean_rank", "mode": "min"}
    checkpoint = {"every": 2, "keep": 1, "keep_best": best}
    train_short(folder, "evaluating", **shared, evaluation=evaluation, checkpoint=checkpoint)


# At ZeRO 3 every forward gathers weights from all ranks: what disturbs nothing there does so nowhere.
@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_evaluation_changes_no_loss_and_equals_that_of_the_checkpoint(tmp_path: Path, zero_stage: int) -> None:
    run_ranks(_both_runs, 2, str(tmp_path), zero_stage)
    assert losses(tmp_path, "evaluating") == losses(tmp_path, "plain")
    assert len(losses(tmp_path, "plain")) == 6
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
    assert result["retrieval"]["image_to_text"]["mean_rank"] == round(ranks[4], 6)
    assert result["mlm"]["accuracy"] == round(metrics[4]["eval/unseen/mlm_accuracy"], 6)


@pytest.mark.slow
def test_evaluation_and_embedding_on_ray_equal_one_process(tmp_path: Path) -> None:
    config, url = untrained_weights(tmp_path)
    report = tmp_path / "report.html"
    alone = evaluate_checkpoint(url, track=False, report=report)
    page = report.read_bytes()
    assert evaluate_checkpoint(url, track=False, report=report, workers=2) == alone
    assert (alone["pairs"], alone["trained_on"]) == (22, ["vision", "pairs"])
    assert report.read_bytes().count(b"<img") == page.count(b"<img")
    shards = config.sources["scenes"].shards
    one, two = (embed(shards, url, str(tmp_path / f"{workers}"), workers) for workers in (None, 2))
    assert two == {**one, "out": str(tmp_path / "2")}
    files = sorted(file.name for file in (tmp_path / "None").glob("*.parquet"))
    assert files
    assert all(parquet.read_table(tmp_path / "None" / n) == parquet.read_table(tmp_path / "2" / n) for n in files)


def _train_on_larger_images(folder: str) -> None:
    stages: list[dict[str, Any]] = [
        {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"mim": {}}},
        {"name": "larger", "sources": {"scenes": 1.0}, "objectives": {"itc": {}, "mlm": {}}, "image_size": 40},
    ]
    shared = {"steps": 3, "global_batch_size": 8, "optimizer": OPTIMIZER}
    drawn = {"scenes": 40, "image_size": 40}
    unseen = {"shards": f"{folder}/unseen", "synthetic": drawn | {"scenes": 12, "seed": 2}}
    changes = {"sources__scenes__synthetic": drawn, "sources__unseen": unseen, "evaluation__source": "unseen"}
    train_short(folder, stages=[stage | shared for stage in stages], cluster__workers=1, **changes)


def test_later_stage_may_read_larger_images(tmp_path: Path) -> None:
    run_ranks(_train_on_larger_images, 1, str(tmp_path))
    run, out, imported = f"{tmp_path}/run", f"{tmp_path}/vlmo.pt", f"{tmp_path}/imported"
    vision, larger = (load_weights(Storage(), f"{run}/stages/{name}") for name in ("0-vision", "1-larger"))
    assert [w.config.model.image_size for w in (vision, larger)] == [24, 40]
    assert [len(w.tensors["positions.image"]) for w in (vision, larger)] == [5**2 + 3, 9**2 + 3]
    metrics = evaluate_checkpoint(run, track=False, report=tmp_path / "report.html")
    assert metrics["retrieval"] is not None
    assert metrics["reconstruction"]["stage"] == "vision"
    # Exported, imported and evaluated on the same pairs, it is the same model.
    assert export_weights(run, "vlmo", out)["left_out"][0] == "image_embedding.mask"
    import_weights(out, "vlmo", imported, vocabulary=f"{run}/vocab.txt")
    again = evaluate_checkpoint(imported, source=f"{tmp_path}/unseen", track=False, report=tmp_path / "imported.html")
    assert again["retrieval"] == metrics["retrieval"]
    assert again["mlm"]["accuracy"] == metrics["mlm"]["accuracy"]


# ---- fine-tuning

TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {  # objective, steps, keys of the stage
    "questions": ("vqa", 40, {"num_answers": 6}),
    "statements": ("nlvr2", 80, {}),
    "labelled": ("classification", 30, {"num_classes": 4}),
}


def _fine_tune(folder: str, source_type: str, more: dict[str, Any]) -> dict[str, Any] | None:
    objective, steps, keys = TASKS[source_type]
    optimizer = {"lr": 2e-3, "warmup_steps": 5, "max_grad_norm": 1.0, **more}
    Path(folder).mkdir()
    config = run_config(Path(folder), source_type, objective, steps, optimizer=optimizer, **keys)
    train(config, lambda progress: None)
    if Collectives().rank != 0:
        return None
    return evaluate_checkpoint(config.folder, track=True, caller=Caller.of(config), ranks=SINGLE_PROCESS)


def test_accuracy_is_above_chance_and_answers_are_stored_and_predicted(tmp_path: Path) -> None:
    more = {"head_lr_multiplier": 2.0, "ema_decay": 0.9}
    answering = run_ranks(_fine_tune, 1, str(tmp_path / "questions"), "questions", more)[0]
    assert answering["vqa"]["accuracy"] > answering["vqa"]["accuracy_without_model"] + 0.3
    assert answering["trained_on"] == []
    url = answering["checkpoint"]
    assert load_weights(Storage(), url).choices[ANSWERS] == Choices((*COLOURS, "yes", "no"))

    right = 0
    for colour in COLOURS:
        image = write_image(tmp_path / f"{colour}.jpg", colour)
        prediction = predict(url, str(image), None, "what colour are the shapes?", top=2)
        right += next(iter(prediction["answers"])) == colour
        assert len(prediction["answers"]) == 2
    assert right >= 3
    with pytest.raises(ConfigError, match="--second-image is given without --image"):
        predict(url, None, "b.jpg", "it is")

    (tmp_path / "a.jpg").write_bytes(image_of_sides())
    command = ["jobs.cli", "predict", url, "--image", str(tmp_path / "a.jpg")]
    refused = run_module(*command)
    assert refused.returncode == 2
    assert "vqa needs an image and a question" in " ".join(refused.stderr.split())
    done = run_module(*command, "--text", "what colour?", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["answers"]


@pytest.mark.slow  # answers and objectives are learnt by faster tests
def test_reasoning_and_classification_are_above_chance(tmp_path: Path) -> None:
    judged = run_ranks(_fine_tune, 1, str(tmp_path / "statements"), "statements", {})[0]["nlvr2"]
    assert judged["accuracy"] > judged["accuracy_without_model"] + 0.2
    assert judged["consistency"] is not None
    classified = run_ranks(_fine_tune, 1, str(tmp_path / "labelled"), "labelled", {})[0]["classification"]
    assert classified["top1"] > classified["chance"] + 0.4
