"""Predictions of a tiny pretrained model: which are made of what is given, and that they are its own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.prediction import Given, Predictor
from pipeline.models.forward import ForwardInput
from pipeline.models.vlmo import VLMo


@pytest.fixture
def predictor(model: VLMo, tokenizer: Tokenizer, config: RunConfig) -> Predictor:
    return Predictor(model, tokenizer, config, config.stages[2], {}, top=3)


@pytest.fixture
def picture(held_out: EvalPairs) -> np.ndarray:
    return held_out.images[0].numpy()


def test_a_pair_gets_its_similarity_and_its_odds_of_matching(
    predictor: Predictor, model: VLMo, picture: np.ndarray, held_out: EvalPairs, tokenizer: Tokenizer
) -> None:
    text = held_out.captions[0][0]
    found = predictor(Given((picture,), text))
    assert found.keys() == {"similarity", "matched"}
    ids = torch.tensor([tokenizer.encode(text, 40).ids])
    with torch.no_grad():
        image = model.eval()({"x": ForwardInput(heads=("itc",), image=held_out.images[:1])})["x"]
        said = model({"x": ForwardInput(heads=("itc",), text=ids)})["x"]
        both = model({"x": ForwardInput(heads=("itm",), image=held_out.images[:1], text=ids)})["x"]["itm"]
    cosines = [(image[name] @ said[name].T).item() for name in ("itc", "itc_vl")]
    assert found["similarity"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert found["matched"] == pytest.approx(both.softmax(dim=1)[0, 1].item(), abs=1e-6)


def test_masked_words_are_guessed_with_a_picture_and_without(predictor: Predictor, picture: np.ndarray) -> None:
    text = "a large [MASK] circle above a [MASK] square"
    alone, beside = predictor(Given((), text)), predictor(Given((picture,), text))
    for found in (alone, beside):
        assert found.keys() == {"words"}
        assert [len(guesses) for guesses in found["words"]] == [3, 3]
    assert alone != beside


def test_a_mask_in_the_text_is_the_tokenizers_mask_and_not_its_letters(
    predictor: Predictor, tokenizer: Tokenizer
) -> None:
    ids, positions = predictor.encode_masked("a large [MASK] circle")
    plain = tokenizer.encode("a large circle", 40).ids
    assert [ids[p] for p in positions] == [tokenizer.mask_id]
    assert [token for token in ids if token != tokenizer.mask_id] == plain


@pytest.mark.parametrize("pictures", [0, 2])
def test_what_nothing_can_be_predicted_from_is_told_with_what_is_needed(
    predictor: Predictor, picture: np.ndarray, pictures: int
) -> None:
    with pytest.raises(
        ConfigError, match=r"contrastive needs a picture and a text; matching needs .*masked_language needs"
    ):
        predictor(Given((picture,) * pictures, "a circle"))


def test_a_text_without_a_token_or_too_long_is_refused(predictor: Predictor, picture: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="no token is left"):
        predictor(Given((picture,), "  "))
    with pytest.raises(ConfigError, match="at most 40"):
        predictor(Given((), "[MASK] " * 50))


def test_a_stage_that_predicts_nothing_says_so(
    model: VLMo, tokenizer: Tokenizer, config: RunConfig, picture: np.ndarray
) -> None:
    with pytest.raises(ConfigError, match="nothing that predicts: masked_image"):
        Predictor(model, tokenizer, config, config.stages[0], {})(Given((picture,), None))
