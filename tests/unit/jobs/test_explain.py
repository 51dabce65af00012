"""`mome explain` on checkpoints of tiny models with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.explain import untrained_notes
from pipeline.models import build_model
from pipeline.objectives import head_config
from pipeline.training.checkpoint import save_weights
from tests.support.trial import Cell, trial_config

TOKENIZER = Tokenizer.train(["a red circle above a blue square"], 60)


@pytest.fixture
def explain(tmp_path):
    """Return a function that runs the command on the weights of a trial and one image, and returns its JSON."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(photo)

    def explain(cell, out, image=photo):
        config = trial_config(cell)
        model = build_model(config.model, TOKENIZER.size, head_config(config, 0), seed=1)
        metadata = {"config": config.model_dump(mode="json"), "stage": "trial", "step": 30}
        url = f"{tmp_path}/run/stages/0-trial"
        save_weights(Storage(), url, dict(model.state_dict()), list(TOKENIZER.tokens), metadata)
        arguments = ["--image", str(image), "--text", "a red circle", "--out", str(tmp_path / out), "--json"]
        done = CliRunner().invoke(app, ["explain", str(tmp_path / "run"), *arguments])
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout.splitlines()[-1])

    return explain


@pytest.mark.parametrize(
    ("kind", "out", "start"), [("vlmo", "drawn.html", b"<!doctype html>"), ("vilt", "drawn.png", b"\x89PNG")]
)
def test_command_renders_the_alignment_of_a_checkpoint(kind, out, start, explain, tmp_path):
    result = explain(Cell("wpa", kind, "pairs"), out)
    assert [word["word"] for word in result["words"]] == ["a", "red", "circle"]
    for word in result["words"]:
        assert len(word["with_image"]["guesses"]) == len(word["without_image"]["guesses"]) == 3
        assert 0 < word["hottest_patch"]["share"] <= 1
    assert (tmp_path / out).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("objective", "source_type", "parts"),
    [("wpa", "pairs", ["mlm"]), ("mlm", "pairs", ["wpa"]), ("mlm", "text", ["wpa", "with images"])],
)
def test_notes_name_objectives_that_were_not_trained(objective, source_type, parts):
    notes = untrained_notes(trial_config(Cell(objective, "vlmo", source_type)), "trial")
    assert len(notes) == len(parts)
    assert all(part in note for part, note in zip(parts, notes, strict=True))


def test_model_without_alignment_is_rejected_with_alternatives(explain):
    with pytest.raises(ConfigError, match=r"dual_encoder.*vlmo, vilt"):
        explain(Cell("itc", "dual_encoder", "pairs"), "drawn.html")


def test_invalid_files_are_rejected_by_name(explain, tmp_path):
    with pytest.raises(ConfigError, match=r"drawn\.pdf.*\.html or \.png"):
        explain(Cell("wpa", "vlmo", "pairs"), "drawn.pdf")
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8 no image")
    with pytest.raises(DataError, match=r"damaged\.jpg.*JPEG, PNG or WebP"):
        explain(Cell("wpa", "vlmo", "pairs"), "drawn.png", damaged)
