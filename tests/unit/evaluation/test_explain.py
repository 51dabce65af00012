"""Explanations show the transport plan and each word's masked prediction; `mome explain` draws them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.images import resize_for
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.explain import draw_explanation, draw_heat_map, explain, render_explanation, untrained_notes
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.objectives import head_config
from pipeline.objectives.wpa import wpa_cost, wpa_plan
from pipeline.training.checkpoint.weights import save_weights
from tests.support.trial import Cell, tiny_section, trial_config

TEXT = "a red circle above blsquare"  # the last word has two tokens
TOKENIZER = Tokenizer.train(["a red circle above a square", "a blue square", "a bl square"], 60)
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["vlmo", "vilt"])
def model(request):
    return build_model(tiny_section(request.param), TOKENIZER.size, seed=4)


@pytest.fixture(scope="module")
def explanation(model):
    return explain(model, TOKENIZER, torch.from_numpy(resize_for(IMAGE, model.config)), TEXT, 12)


def test_heat_is_the_transport_plan_and_guesses_are_those_of_the_model_with_the_word_masked(model, explanation):
    rows, columns = (side // model.config.patch_size for side in explanation.image.shape[:2])
    assert columns == (3 if model.config.kind == "vilt" else 2), "ViLT keeps the aspect ratio"
    tokens = TOKENIZER.encode(TEXT, 12)
    pair = ForwardInput(heads=("alignment",), image=explanation.image[None], text=torch.tensor([tokens.ids]))
    with torch.no_grad():
        out = model({"x": pair})["x"]
        cost = wpa_cost(out["words"], out["patches"])
        plan = wpa_plan(cost, out["words_keep"], out["patches_keep"])[0]
    assert explanation.distance == pytest.approx((plan * cost[0]).sum().item())
    assert [word.word for word in explanation.words] == TEXT.split()
    for number, word in enumerate(explanation.words):
        places = [place for place, of in enumerate(tokens.word_of) if of == number]
        assert len(places) == (1 if number < 4 else len(tokens.ids) - 6)
        moved = plan[places].sum(dim=0)
        assert word.heat.shape == (rows, columns)
        torch.testing.assert_close(word.heat.flatten(), moved / moved.sum(), rtol=1e-4, atol=1e-6)
        text = torch.tensor([[TOKENIZER.mask_id if place in places else t for place, t in enumerate(tokens.ids)]])
        truth = [tokens.ids[place] for place in places]
        for image, condition in ((explanation.image[None], word.with_image), (None, word.without_image)):
            one = ForwardInput(heads=("mlm",), image=image, text=text, mask_positions=torch.tensor([places]))
            with torch.no_grad():
                odds = model({"x": one})["x"]["mlm"][0].softmax(-1)
            expected = odds[torch.arange(len(truth)), truth].prod().item()
            assert condition.truth_probability == pytest.approx(expected, rel=1e-4)
            assert condition.guesses[0].word == TOKENIZER.decode(odds.argmax(dim=1).tolist())
            assert condition.guesses[0].probability == pytest.approx(odds.amax(dim=1).prod().item(), rel=1e-4)
            assert len(condition.guesses) == (3 if number < 4 else 1)
            assert all(guess.is_right == (guess.word == word.word) for guess in condition.guesses)


def test_drawings_are_complete_and_escape_the_text(explanation):
    word = explanation.words[0]
    drawn = np.asarray(draw_heat_map(explanation, word)).astype(int)
    redness = torch.from_numpy(drawn[:, :, 0] - drawn[:, :, 1]).float()
    of_patch = torch.nn.functional.adaptive_avg_pool2d(redness[None], word.heat.shape)
    assert int(of_patch.argmax()) == int(word.heat.argmax()), "the hottest patch is the reddest"
    page = render_explanation(explanation, "<b>words</b>", "checkpoint", ["a note"], ".html").decode()
    assert page.count("data:image/png;base64,") == 1 + len(explanation.words)
    assert not any(part in page for part in ("<b>words</b>", "http:", "https:"))
    guesses = [guess.word for word in explanation.words for guess in word.with_image.guesses]
    assert all(guess in page or not guess.isalnum() for guess in guesses)
    pixels = np.asarray(draw_explanation(explanation, TEXT, "checkpoint", []))
    assert pixels.shape[1] >= 16 + 4 * (224 + 16)
    assert (pixels == 255).all(axis=2).mean() < 0.9


@pytest.fixture
def command(tmp_path):
    """Return a function that runs `mome explain` on the untrained weights of a trial and returns its JSON."""
    photo = tmp_path / "photo.png"
    Image.fromarray(IMAGE).save(photo)

    def command(cell, out, text="a red circle", image=photo):
        config = trial_config(cell)
        model = build_model(config.model, TOKENIZER.size, head_config(config, 0), seed=1)
        metadata = {"config": config.model_dump(mode="json"), "stage": "trial", "step": 30}
        run = tmp_path / str(cell)
        save_weights(Storage(), f"{run}/stages/0-trial", dict(model.state_dict()), list(TOKENIZER.tokens), metadata)
        arguments = ["--image", str(image), "--text", text, "--out", str(tmp_path / out), "--json"]
        done = CliRunner().invoke(app, ["explain", str(run), *arguments])
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout.splitlines()[-1])

    return command


@pytest.mark.parametrize(
    ("kind", "out", "start"), [("vlmo", "drawn.html", b"<!doctype html>"), ("vilt", "drawn.png", b"\x89PNG")]
)
def test_command_renders_the_alignment_of_a_checkpoint(kind, out, start, command, tmp_path):
    result = command(Cell("wpa", kind, "pairs"), out)
    assert [word["word"] for word in result["words"]] == ["a", "red", "circle"]
    for word in result["words"]:
        assert len(word["with_image"]["guesses"]) == len(word["without_image"]["guesses"]) == 3
        assert 0 < word["hottest_patch"]["share"] <= 1
    assert (tmp_path / out).read_bytes().startswith(start)


def test_untrained_objectives_are_noted_and_unusable_inputs_rejected_by_name(command, tmp_path):
    for objective, source_type, parts in (
        ("wpa", "pairs", ["mlm"]),
        ("mlm", "pairs", ["wpa"]),
        ("mlm", "text", ["wpa", "with images"]),
    ):
        notes = untrained_notes(trial_config(Cell(objective, "vlmo", source_type)), "trial")
        assert [part in note for part, note in zip(parts, notes, strict=True)] == [True] * len(parts)
    wpa, damaged = Cell("wpa", "vlmo", "pairs"), tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8 no image")
    for arguments, error, message in (
        ((Cell("itc", "dual_encoder", "pairs"), "drawn.html"), ConfigError, r"dual_encoder.*vlmo, vilt"),
        ((wpa, "drawn.pdf"), ConfigError, r"drawn\.pdf.*\.html or \.png"),
        ((wpa, "drawn.png", "a", damaged), DataError, r"damaged\.jpg.*JPEG, PNG or WebP"),
        ((wpa, "drawn.png", " "), DataError, "at least one word"),
    ):
        with pytest.raises(error, match=message):
            command(*arguments)
