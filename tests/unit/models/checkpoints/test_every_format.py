"""Every published format: exact round trips, inferred sizes, and faults listed by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.models import build_model
from pipeline.models.checkpoints import FORMATS
from pipeline.models.model import HeadConfig
from tests.support.forwards import MODELS, VOCABULARY

# Format, model, and the keys of its section that its tensors do not show.
FORMAT_MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("vlmo", "vlmo", {"max_text_length": 12}),
    ("vlmo", "vlmo_absolute", {"heads": 3}),
    ("vilt", "vilt", {"heads": 3, "longest_side": 48}),
    ("vilt-hf", "vilt", {"heads": 3, "longest_side": 48}),
    ("vit", "vit", {"heads": 3}),
    ("beit", "vlmo", {"max_text_length": 12, "vision_language_layers": 2}),
    ("bert", "imagebert", {"heads": 3, "max_text_length": 12, "region_features": 6, "region_classes": 5}),
]
each_format = pytest.mark.parametrize(("name", "model", "hidden"), FORMAT_MODELS)


def weights(model: str, heads: HeadConfig = HeadConfig()) -> dict[str, Tensor]:
    """Return a model's weights, all of them drawn at random."""
    state = build_model(MODELS[model][0], VOCABULARY, heads).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "model", "heads", "left_out"),
    [
        ("vlmo", "vlmo", HeadConfig(), ()),
        ("vlmo", "vlmo_absolute", HeadConfig(answers=7, nlvr2=True), ()),
        ("vlmo", "vlmo", HeadConfig("pixels", answers=7), ("mim_head.", "image_embedding.mask")),
        ("vilt", "vilt", HeadConfig(), ()),
        ("vilt", "vilt", HeadConfig(answers=5, nlvr2=True, ranking=True), ()),
        ("vilt", "vilt", HeadConfig("pixels"), ("mim_head.", "image_embedding.mask")),
        ("vilt-hf", "vilt", HeadConfig(ranking=True), ("itm_head.",)),
        ("vilt-hf", "vilt", HeadConfig(answers=5), ("itm_head.",)),
        ("vilt-hf", "vilt", HeadConfig(nlvr2=True), ("itm_head.",)),
        ("vit", "vit", HeadConfig("mean_colour", classes=5), ("mim_head.",)),
        ("bert", "imagebert", HeadConfig(), ("region_embedding.", "itm_head.", "moc_head.", "mrfr_head.")),
    ],
)
def test_round_trip_of_our_weights_is_exact(
    name: str, model: str, heads: HeadConfig, left_out: tuple[str, ...]
) -> None:
    config, state = MODELS[model][0], weights(model, heads)
    back = FORMATS[name].read(FORMATS[name].write(state, config), config, ())
    assert list(back) == [name for name in state if not (left_out and name.startswith(left_out))]
    assert all(torch.equal(back[name], state[name]) for name in back)


@each_format
def test_section_is_inferred_from_the_shapes(name: str, model: str, hidden: dict[str, Any]) -> None:
    config = MODELS[model][0]
    section = FORMATS[name].infer(FORMATS[name].write(weights(model), config), hidden)
    assert type(config).model_validate(section).architecture() == config.architecture()
    with pytest.raises(ConfigError, match="checkpoint"):
        FORMATS[name].infer({"weight": torch.zeros(2)}, {})


@each_format
def test_every_fault_is_listed_by_name_and_may_be_allowed(name: str, model: str, hidden: dict[str, Any]) -> None:
    config = MODELS[model][0]
    published = FORMATS[name].write(weights(model), config)
    whole = FORMATS[name].read(published, config, ())
    missing, misshaped = sorted(n for n in published if "norm" in n.lower() and n.endswith("weight"))[:2]
    del published[missing]
    published[misshaped] = torch.zeros(3)
    published["other.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        FORMATS[name].read(published, config, ())
    for fault in (f"missing: {missing}\n", "unexpected: other.weight\n", f"{misshaped} (is (3,), must be (24,))"):
        assert fault in str(error.value)
    read = FORMATS[name].read(published, config, (missing, misshaped[:-6] + "*", "other.*"))
    lacking = {n for n in whole if n not in read}
    assert len(lacking) == 2
    assert all(n.endswith("norm.weight") or n.endswith("LayerNorm.weight") for n in lacking)
