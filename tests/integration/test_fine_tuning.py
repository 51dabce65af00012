"""Fine-tuning end to end: shards, training, evaluation and prediction of each task, far above chance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import ConfigError
from pipeline.data.contents.choices import ANSWERS, Choices
from pipeline.data.storage import Storage
from pipeline.training.checkpoint import load_weights
from tests.support.fine_tuning_data import COLOURS, image_of_sides, run_config, write_image
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"questions": 40, "statements": 80, "labelled": 30}
OBJECTIVES = {"questions": "vqa", "statements": "nlvr2", "labelled": "classification"}
KEYS: dict[str, dict[str, Any]] = {"questions": {"num_answers": 6}, "statements": {}, "labelled": {"num_classes": 4}}


def _fine_tune(folder: str, source_type: str, optimizer: dict[str, Any]) -> dict[str, Any] | None:
    """Train on this rank; rank 0 returns the evaluation."""
    from jobs.evaluate import evaluate_run
    from pipeline.training.collectives import Collectives
    from pipeline.training.loop import train

    config = run_config(
        Path(folder), source_type, OBJECTIVES[source_type], STEPS[source_type], optimizer=optimizer, **KEYS[source_type]
    )
    train(config, lambda progress: None)
    return evaluate_run(config) if Collectives().rank == 0 else None


PLAIN = {"lr": 2e-3, "warmup_steps": 5, "max_grad_norm": 1.0}


def fine_tuned(folder: Path, source_type: str, optimizer: dict[str, Any] = PLAIN) -> dict[str, Any]:
    return run_ranks(_fine_tune, 1, str(folder), source_type, optimizer)[0]


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the evaluation of a question-answering run with a head learning rate and a moving average."""
    optimizer = {**PLAIN, "head_lr_multiplier": 2.0, "ema_decay": 0.9}
    return fine_tuned(tmp_path_factory.mktemp("vqa"), "questions", optimizer)


def test_vqa_accuracy_of_the_averaged_weights(answering: dict[str, Any]) -> None:
    assert answering["vqa"]["accuracy"] > answering["vqa"]["accuracy_without_model"] + 0.3
    assert answering["trained_on"] == []


def test_answer_vocabulary_is_stored_with_the_weights(answering: dict[str, Any]) -> None:
    weights = load_weights(Storage(), answering["checkpoint"])
    assert weights.choices[ANSWERS] == Choices((*COLOURS, "yes", "no"))


def test_nlvr2_accuracy_is_above_chance(tmp_path: Path) -> None:
    metrics = fine_tuned(tmp_path, "statements")["nlvr2"]
    assert metrics["accuracy"] > metrics["accuracy_without_model"] + 0.2
    assert metrics["consistency"] is not None


def test_classification_accuracy_is_above_chance(tmp_path: Path) -> None:
    metrics = fine_tuned(tmp_path, "labelled")["classification"]
    assert metrics["top1"] > metrics["chance"] + 0.4


def test_predict_answers_questions_about_an_image(answering: dict[str, Any], tmp_path: Path) -> None:
    from jobs.predict import predict

    right = 0
    for colour in COLOURS:
        image = write_image(tmp_path / f"{colour}.jpg", colour)
        prediction = predict(answering["checkpoint"], str(image), None, "what colour are the shapes?", top=2)
        right += next(iter(prediction["answers"])) == colour
        assert len(prediction["answers"]) == 2
    assert right >= 3


def test_predict_without_a_question_ends_with_status_2(answering: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_of_sides())
    command = [sys.executable, "-m", "jobs.cli", "predict", answering["checkpoint"], "--image", str(tmp_path / "a.jpg")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert "vqa needs an image and a question" in " ".join(done.stderr.split())
    process = subprocess.run([*command, "--text", "what colour?", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(process.stdout.splitlines()[-1])["answers"]


def test_wrong_options_of_predict_are_rejected_by_name(answering: dict[str, Any], tmp_path: Path) -> None:
    from jobs.predict import predict

    with pytest.raises(ConfigError, match="--second-image is given without --image"):
        predict(answering["checkpoint"], None, "b.jpg", "it is")
    with pytest.raises(ConfigError, match="no such file; give the path or URL"):
        predict(answering["checkpoint"], str(tmp_path / "nowhere.jpg"), None, "why?")
