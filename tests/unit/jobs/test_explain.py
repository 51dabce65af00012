"""`mome explain` on checkpoints of tiny models with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.predict import explain_checkpoint
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.explain import untrained_notes
from pipeline.models import build_model
from pipeline.objectives import head_config
from pipeline.training.checkpoint import save_weights
from tests.support.trial import Cell, trial_config

TOKENIZER = Tokenizer.train(["a red circle above a blue square"], 60)


def checkpoint_of(cell: Cell, folder: Path) -> str:
    config = trial_config(cell)
    model = build_model(config.model, TOKENIZER.size, head_config(config, 0), seed=1)
    metadata = {"config": config.model_dump(mode="json"), "stage": "trial", "step": 30}
    url = str(folder / "stages" / "0-trial")
    save_weights(Storage(), url, dict(model.state_dict()), list(TOKENIZER.tokens), metadata)
    return str(folder)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("kind", ["vlmo", "vilt"])
@pytest.mark.parametrize("ending", ["html", "png"])
def test_command_renders_the_alignment_of_a_checkpoint(kind: str, ending: str, tmp_path: Path, picture: str) -> None:
    run = checkpoint_of(Cell("wpa", kind, "pairs"), tmp_path / "run")
    out = tmp_path / f"drawn.{ending}"
    told = CliRunner().invoke(
        app, ["explain", run, "--image", picture, "--text", "a red circle", "--out", str(out), "--json"]
    )
    assert told.exit_code == 0, told.output
    result = json.loads(told.stdout.splitlines()[-1])
    assert [word["word"] for word in result["words"]] == ["a", "red", "circle"]
    for word in result["words"]:
        assert len(word["with_image"]["guesses"]) == len(word["without_image"]["guesses"]) == 3
        assert 0 < word["hottest_patch"]["share"] <= 1
    assert out.read_bytes().startswith(b"<!doctype html>" if ending == "html" else b"\x89PNG")


def test_notes_name_objectives_that_were_not_trained() -> None:
    def notes(cell: Cell) -> list[str]:
        return untrained_notes(trial_config(cell), "trial")

    aligned, words = notes(Cell("wpa", "vlmo", "pairs")), notes(Cell("mlm", "vlmo", "pairs"))
    assert len(aligned) == 1
    assert "mlm" in aligned[0]
    assert len(words) == 1
    assert "wpa" in words[0]
    assert "with images" in notes(Cell("mlm", "vlmo", "text"))[1]


def test_model_without_alignment_is_rejected_with_alternatives(tmp_path: Path, picture: str) -> None:
    run = checkpoint_of(Cell("itc", "dual_encoder", "pairs"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"dual_encoder.*vlmo, vilt"):
        explain_checkpoint(run, picture, "a circle", str(tmp_path / "out.html"))


def test_invalid_files_are_rejected_by_name(tmp_path: Path, picture: str) -> None:
    run = checkpoint_of(Cell("wpa", "vlmo", "pairs"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"drawn\.pdf.*\.html or \.png"):
        explain_checkpoint(run, picture, "a circle", str(tmp_path / "drawn.pdf"))
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(DataError, match=r"damaged\.jpg.*JPEG, PNG or WebP"):
        explain_checkpoint(run, str(damaged), "a circle", str(tmp_path / "drawn.png"))
