"""Explanations by tiny models with random weights show the transport plan and each word's masked prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config.errors import DataError
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.explain import draw_heat_map, explain, explanation_html, explanation_png
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.objectives.wpa import wpa_cost, wpa_plan
from tests.support.trial import tiny_section

TEXT = "a red circle above blsquare"  # the last word has two tokens
TOKENIZER = Tokenizer.train(["a red circle above a square", "a blue square", "a bl square"], 60)
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["vlmo", "vilt"])
def model(request):
    return build_model(tiny_section(request.param), TOKENIZER.size, seed=4)


@pytest.fixture(scope="module")
def explanation(model):
    return explain(model, TOKENIZER, IMAGE, TEXT, 12)


def test_heat_is_the_normalised_transport_plan_of_each_word(model, explanation):
    rows, columns = (side // model.config.patch_size for side in explanation.image.shape[:2])
    assert columns == (3 if model.config.kind == "vilt" else 2), "ViLT keeps the aspect ratio"
    tokens = TOKENIZER.encode(TEXT, 12)
    pair = ForwardInput(heads=("alignment",), image=explanation.image[None], text=torch.tensor([tokens.ids]))
    with torch.no_grad():
        out = model({"x": pair})["x"]
        plan = wpa_plan(wpa_cost(out["words"], out["patches"]), out["words_keep"], out["patches_keep"])[0]
    assert [word.word for word in explanation.words] == TEXT.split()
    for number, word in enumerate(explanation.words):
        places = [place for place, of in enumerate(tokens.word_of) if of == number]
        assert len(places) == (1 if number < 4 else len(tokens.ids) - 6)
        moved = plan[places].sum(dim=0)
        assert word.heat.shape == (rows, columns)
        torch.testing.assert_close(word.heat.flatten(), moved / moved.sum(), rtol=1e-4, atol=1e-6)
    assert explanation.distance == pytest.approx((plan * wpa_cost(out["words"], out["patches"])[0]).sum().item())


def test_guesses_are_those_of_the_model_with_the_word_masked(model, explanation):
    tokens = TOKENIZER.encode(TEXT, 12)
    for number in (2, 4):
        word = explanation.words[number]
        places = [place for place, of in enumerate(tokens.word_of) if of == number]
        masked = [TOKENIZER.mask_id if place in places else token for place, token in enumerate(tokens.ids)]
        truth = torch.tensor([tokens.ids[place] for place in places])
        for image, condition in ((explanation.image[None], word.with_image), (None, word.without_image)):
            with torch.no_grad():
                text, positions = torch.tensor([masked]), torch.tensor([places])
                one = ForwardInput(heads=("mlm",), image=image, text=text, mask_positions=positions)
                odds = model({"x": one})["x"]["mlm"][0].softmax(-1)
            expected = odds[torch.arange(len(truth)), truth].prod().item()
            assert condition.truth_probability == pytest.approx(expected, rel=1e-4)
            assert condition.guesses[0].word == TOKENIZER.decode(odds.argmax(dim=1).tolist())
            assert condition.guesses[0].probability == pytest.approx(odds.amax(dim=1).prod().item(), rel=1e-4)
            assert len(condition.guesses) == (3 if number == 2 else 1)
            assert all(guess.is_right == (guess.word == word.word) for guess in condition.guesses)


def test_panel_is_reddest_at_the_hottest_patch(explanation):
    word = explanation.words[0]
    drawn = np.asarray(draw_heat_map(explanation, word)).astype(int)
    redness = torch.from_numpy(drawn[:, :, 0] - drawn[:, :, 1]).float()
    of_patch = torch.nn.functional.adaptive_avg_pool2d(redness[None], word.heat.shape)
    assert int(of_patch.argmax()) == int(word.heat.argmax())


def test_page_is_complete_and_escapes_the_text(explanation):
    page = explanation_html(explanation, "<b>words</b>", "checkpoint", ["a note"])
    assert "<b>words</b>" not in page
    assert page.count("data:image/png;base64,") == 1 + len(explanation.words)
    assert "http:" not in page
    assert "https:" not in page
    guesses = [guess.word for word in explanation.words for guess in word.with_image.guesses]
    assert all(guess in page or not guess.isalnum() for guess in guesses)


def test_image_has_a_panel_for_every_word(explanation):
    pixels = np.asarray(explanation_png(explanation, TEXT, "checkpoint", []))
    assert pixels.shape[1] >= 16 + 4 * (224 + 16)
    assert (pixels == 255).all(axis=2).mean() < 0.9


def test_text_without_a_word_is_rejected(model):
    with pytest.raises(DataError, match="at least one word"):
        explain(model, TOKENIZER, IMAGE, " ", 12)
