"""Fine-tuning end to end: shards, training, evaluation and prediction of each task, far above chance."""

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
from pipeline.evaluation.ranks import SINGLE_PROCESS
from pipeline.training.checkpoint.weights import load_weights
from tests.support.fine_tuning_data import COLOURS, image_of_sides, run_config, write_image
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {  # objective, steps, keys of the stage
    "questions": ("vqa", 40, {"num_answers": 6}),
    "statements": ("nlvr2", 80, {}),
    "labelled": ("classification", 30, {"num_classes": 4}),
}


def _fine_tune(folder: str, source_type: str, more: dict[str, Any]) -> dict[str, Any] | None:
    """Train on this rank; rank 0 returns the evaluation."""
    from jobs.configs import Caller
    from jobs.evaluate import evaluate_checkpoint
    from pipeline.training.collectives import Collectives
    from pipeline.training.loop import train

    objective, steps, keys = TASKS[source_type]
    optimizer = {"lr": 2e-3, "warmup_steps": 5, "max_grad_norm": 1.0, **more}
    Path(folder).mkdir()
    config = run_config(Path(folder), source_type, objective, steps, optimizer=optimizer, **keys)
    train(config, lambda progress: None)
    if Collectives().rank != 0:
        return None
    return evaluate_checkpoint(config.folder, track=True, caller=Caller.of(config), ranks=SINGLE_PROCESS)


def test_accuracy_is_above_chance_and_answers_are_stored_and_predicted(tmp_path: Path) -> None:
    from jobs.predict import predict

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
    with pytest.raises(ConfigError, match="no such file; give the path or URL"):
        predict(url, str(tmp_path / "nowhere.jpg"), None, "why?")

    (tmp_path / "a.jpg").write_bytes(image_of_sides())
    command = [sys.executable, "-m", "jobs.cli", "predict", url, "--image", str(tmp_path / "a.jpg")]
    settings: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **settings)
    assert done.returncode == 2
    assert "vqa needs an image and a question" in " ".join(done.stderr.split())
    process = subprocess.run([*command, "--text", "what colour?", "--json"], **settings)
    assert json.loads(process.stdout.splitlines()[-1])["answers"]


def test_reasoning_and_classification_are_above_chance(tmp_path: Path) -> None:
    judged = run_ranks(_fine_tune, 1, str(tmp_path / "statements"), "statements", {})[0]["nlvr2"]
    assert judged["accuracy"] > judged["accuracy_without_model"] + 0.2
    assert judged["consistency"] is not None
    classified = run_ranks(_fine_tune, 1, str(tmp_path / "labelled"), "labelled", {})[0]["classification"]
    assert classified["top1"] > classified["chance"] + 0.4
