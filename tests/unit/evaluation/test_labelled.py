"""Zero-shot classification by the prompts of class names, and the linear probe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ObjectiveConfig, RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.classification import class_vectors, fit_linear_probe
from pipeline.evaluation.evaluate import evaluate
from pipeline.models.forward import ForwardInput, ForwardOutput
from tests.support.fine_tuning_data import COLOURS, colour_of, run_config

PROMPTS = ("a photo of a {}.", "the {} thing")


class ColourSpace(nn.Module):
    """Model that embeds images and texts by the colour they show or name, with an offset for each text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ids = [tokenizer.encode(name, 8).ids[1] for name in COLOURS]

    def forward(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        (one,) = passes.values()
        if one.heads == ("tokens",):
            assert one.image is not None
            tokens = F.one_hot(colour_of(one.image), 4).float()[:, None].expand(-1, 5, -1)
            return {"only": {"tokens": tokens}}
        if one.text is None:
            assert one.image is not None
            return {"only": {"itc": F.one_hot(colour_of(one.image), 4).float()}}
        named = torch.stack([(one.text == number).any(dim=1) for number in self.ids], dim=1).float()
        noise = 0.1 * (one.text.sum(dim=1, keepdim=True) % 7)
        return {"only": {"itc": F.normalize(named + noise, dim=1)}}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*COLOURS, "a photo of the thing."] * 5, 200)


def contrastive(config: RunConfig) -> RunConfig:
    """Return the config with ITC as the objective of its stage."""
    stage = config.stages[0].model_copy(update={"objectives": {"itc": ObjectiveConfig()}, "classes": None})
    section = config.evaluation.model_copy(update={"prompts": PROMPTS})
    return config.model_copy(update={"stages": (stage,), "evaluation": section})


def test_class_embedding_is_the_mean_of_its_prompts(tokenizer: Tokenizer) -> None:
    model = ColourSpace(tokenizer)

    def vector(text: str) -> Tensor:
        ids = torch.tensor([tokenizer.encode(text, 16).ids])
        return model({"x": ForwardInput(heads=("itc",), text=ids)})["only"]["itc"][0]

    found = class_vectors(model, tokenizer, COLOURS, PROMPTS, 16, batch=3)
    for row, name in zip(found, COLOURS, strict=True):
        mean = torch.stack([vector(prompt.replace("{}", name)) for prompt in PROMPTS]).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_zero_shot_classifies_by_class_names(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = contrastive(run_config(tmp_path, "labelled", "classification", 1, num_classes=4))
    found = evaluate(ColourSpace(tokenizer), tokenizer, config, Storage(), probe="train")
    result = found.to_json()
    assert result["zero_shot"] == {"images": 60, "top1": 1.0, "top5": 1.0, "chance": 0.25}
    assert result["linear_probe"]["top1"] == 1.0
    assert result["linear_probe"]["trained_on"] == 200
    assert result["classification"] is None
    assert {"eval/test/zero_shot_top1", "eval/test/linear_probe_top1"} <= found.metrics().keys()
    (tmp_path / "labelled-1" / "classes.json").unlink()
    with pytest.raises(ConfigError, match=r"classes\.json with its class names is missing"):
        evaluate(ColourSpace(tokenizer), tokenizer, config, Storage())


def test_the_probe_is_the_minimum_of_its_loss() -> None:
    """The gradient, derived by hand in NumPy, is zero at the minimum."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(80, 6)), random.integers(0, 3, 80)
    penalty = 0.01
    weight, bias = (each.numpy() for each in fit_linear_probe(torch.tensor(x), torch.tensor(y), 3, penalty))
    odds = np.exp(x @ weight + bias)
    wrong = odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[y]
    assert np.abs(x.T @ wrong / 80 + penalty * weight).max() < 1e-5
    assert np.abs(wrong.mean(axis=0)).max() < 1e-5
    assert np.abs(weight).max() > 0.1


def test_prompt_requires_a_placeholder_for_the_name(tmp_path: Path) -> None:
    from pipeline.config.load import validate

    values = run_config(tmp_path, "labelled", "classification", 1, num_classes=4).model_dump(mode="json")
    values["evaluation"]["prompts"] = ["a photo"]
    with pytest.raises(ConfigError, match=r"evaluation.prompts.*must contain \{\} exactly once"):
        validate(values, "tiny")
