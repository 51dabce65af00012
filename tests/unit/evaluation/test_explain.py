"""Explanations by tiny models with random weights show the transport plan and each word's masked prediction."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.errors import DataError
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.explain import (
    Explanation,
    draw_heat_map,
    explain,
    explanation_html,
    explanation_png,
    mask_each,
    positions_of_words,
    share_of,
)
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.models.model import Model
from pipeline.objectives.wpa import wpa_cost, wpa_plan
from tests.support.trial import tiny_section

TEXT = "a red circle above a square"
TOKENIZER = Tokenizer.train([TEXT, "a blue square", "a bl square"], 60)
PICTURE = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)


@pytest.fixture(params=["vlmo", "vilt"])
def model(request: pytest.FixtureRequest) -> Model:
    return build_model(tiny_section(request.param), TOKENIZER.size, seed=4)


@pytest.fixture
def found(model: Model) -> Explanation:
    return explain(model, TOKENIZER, PICTURE, TEXT, 12)


def test_heat_of_each_word_is_a_distribution_over_patches(model: Model, found: Explanation) -> None:
    assert [word.word for word in found.words] == TEXT.split()
    rows, columns = (side // model.config.patch_size for side in found.picture.shape[:2])
    assert columns == (3 if model.config.kind == "vilt" else 2), "ViLT keeps the aspect ratio"
    for word in found.words:
        assert word.heat.shape == (rows, columns)
        assert word.heat.min() >= 0
        assert word.heat.sum().item() == pytest.approx(1, abs=1e-5)


def test_heat_is_the_transport_plan_of_the_pair(model: Model, found: Explanation) -> None:
    text = torch.tensor([TOKENIZER.encode(TEXT, 12).ids])
    with torch.no_grad():
        out = model({"x": ForwardInput(heads=("alignment",), image=found.picture[None], text=text)})["x"]
        plan = wpa_plan(wpa_cost(out["words"], out["patches"]), out["words_keep"], out["patches_keep"])[0]
    assert plan.sum().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(found.words[1].heat.flatten() * plan[2].sum(), plan[2], rtol=1e-4, atol=1e-6)
    assert found.distance == pytest.approx((plan * wpa_cost(out["words"], out["patches"])[0]).sum().item())


def test_words_of_several_tokens_are_masked_and_shown_as_one() -> None:
    tokens = TOKENIZER.encode("a blsquare", 12)
    words = positions_of_words(tokens)
    assert len(words) == 2
    assert len(words[1]) > 1
    masked = mask_each(tokens, words, TOKENIZER.mask_id)
    assert masked.labels[1] == tuple(tokens.ids[position] for position in words[1])
    for row, places in zip(masked.rows, words, strict=True):
        assert [i for i, token in enumerate(row) if token == TOKENIZER.mask_id] == places
    plan = torch.tensor([[0.0, 0.0], [0.3, 0.1], [0.2, 0.4]])
    torch.testing.assert_close(share_of(plan, [1, 2]), torch.tensor([0.5, 0.5]))


def test_guesses_are_those_of_the_model_with_the_word_masked(model: Model, found: Explanation) -> None:
    ids = TOKENIZER.encode(TEXT, 12).ids
    masked = torch.tensor([[*ids[:3], TOKENIZER.mask_id, *ids[4:]]])
    for image, condition in (
        (found.picture[None], found.words[2].with_image),
        (None, found.words[2].without_image),
    ):
        with torch.no_grad():
            one = ForwardInput(heads=("mlm",), image=image, text=masked, mask_positions=torch.tensor([[3]]))
            odds = model({"x": one})["x"]["mlm"][0, 0].softmax(-1)
        assert condition.truth_probability == pytest.approx(odds[ids[3]].item(), rel=1e-4)
        assert condition.guesses[0].word == TOKENIZER.decode([int(odds.argmax())])
        assert len(condition.guesses) == 3
        assert [guess.is_right for guess in condition.guesses] == [
            guess.word == "circle" for guess in condition.guesses
        ]


def test_panel_is_reddest_at_the_hottest_patch(found: Explanation) -> None:
    word = found.words[0]
    drawn = np.asarray(draw_heat_map(found, word)).astype(int)
    redness = drawn[:, :, 0] - drawn[:, :, 1]
    side = redness.shape[1] // word.heat.shape[1]
    of_patch = [
        redness[side * r : side * (r + 1), side * c : side * (c + 1)].mean() for r, c in np.ndindex(*word.heat.shape)
    ]
    assert int(np.argmax(of_patch)) == int(word.heat.argmax())


def test_page_is_complete_and_escapes_the_text(found: Explanation) -> None:
    page = explanation_html(found, "<b>words</b>", "checkpoint", ["a note"])
    assert "<b>words</b>" not in page
    assert page.count("data:image/png;base64,") == 1 + len(found.words)
    assert "http:" not in page
    assert "https:" not in page
    assert all(
        guess.word in page or not guess.word.isalnum() for word in found.words for guess in word.with_image.guesses
    )


def test_image_has_a_panel_for_every_word(found: Explanation) -> None:
    page = explanation_png(found, TEXT, "checkpoint", [])
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    again = np.asarray(Image.open(buffer))
    assert again.shape[1] >= 16 + 4 * (224 + 16)
    assert (again == np.array([255, 255, 255])).all(axis=2).mean() < 0.9


def test_text_without_a_word_is_rejected(model: Model) -> None:
    with pytest.raises(DataError, match="at least one word"):
        explain(model, TOKENIZER, PICTURE, " ", 12)
