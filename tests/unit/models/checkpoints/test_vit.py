"""ViT with Hugging Face's random weights equals Hugging Face's ViT (C8), and exports the weights back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, ViTForImageClassification, ViTModel
from transformers import ViTConfig as Theirs

from pipeline.config.schema import ViTConfig
from pipeline.models import build_model
from pipeline.models.checkpoints import FORMATS
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.models.vit import ViT
from tests.support.hugging_face import randomised, saved

CONFIG = ViTConfig(width=24, layers=3, heads=2, image_size=24, patch_size=8)
CLASSES = 5


def their_config(**more: object) -> Theirs:
    return Theirs(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=24,
        patch_size=8,
        num_labels=CLASSES,
        **more,
    )


def ours(state: dict[str, Tensor], heads: HeadConfig = HeadConfig(classes=CLASSES)) -> ViT:
    model = ViT(CONFIG, heads=heads)
    model.load_state_dict(FORMATS["vit"].read(state, CONFIG))
    return model


def pictures() -> Tensor:
    return torch.rand(3, 24, 24, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("epsilon", [1e-6, 1e-12], ids=["the JAX release's epsilon", "Hugging Face's epsilon"])
def test_logits_and_gradients_equal_hugging_face(tmp_path: Path, epsilon: float) -> None:
    theirs = randomised(ViTForImageClassification(their_config(layer_norm_eps=epsilon)))
    model = ours(saved(theirs, tmp_path))
    image = pictures()
    label = torch.tensor([0, 4, 2])
    logits = model({"one": ForwardInput(heads=("classes",), image=image)})["one"]["classes"]
    expected = theirs(image.permute(0, 3, 1, 2)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.nn.functional.cross_entropy(logits, label).backward()
    torch.nn.functional.cross_entropy(expected, label).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = FORMATS["vit"].read(saved_gradients(theirs, tmp_path), CONFIG)
    assert grads.keys() == gradients.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5)


def saved_gradients(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Return the gradients under the published names."""
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(gradients)
    return saved(model, folder)


def test_features_equal_hugging_faces_model_without_a_head(tmp_path: Path) -> None:
    theirs = randomised(ViTModel(their_config()))
    model = ours(saved(theirs, tmp_path), HeadConfig())
    image = pictures()
    tokens = model({"one": ForwardInput(heads=("tokens",), image=image)})["one"]["tokens"]
    torch.testing.assert_close(tokens, theirs(image.permute(0, 3, 1, 2)).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_hugging_face_loads_our_export(tmp_path: Path) -> None:
    model = build_model(CONFIG, 0, HeadConfig(classes=CLASSES), seed=1)
    theirs_config = their_config(layer_norm_eps=1e-6)
    theirs_config.save_pretrained(tmp_path)
    save_file(FORMATS["vit"].write(model.state_dict(), CONFIG), tmp_path / "model.safetensors", {"format": "pt"})
    theirs, told = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    image = pictures()
    logits = model({"one": ForwardInput(heads=("classes",), image=image)})["one"]["classes"]
    torch.testing.assert_close(theirs.eval()(image.permute(0, 3, 1, 2)).logits, logits, rtol=1e-5, atol=1e-5)


def test_hugging_face_weights_round_trip(tmp_path: Path) -> None:
    published = saved(randomised(ViTForImageClassification(their_config())), tmp_path)
    again = FORMATS["vit"].write(FORMATS["vit"].read(published, CONFIG), CONFIG)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in published.items())


def test_section_is_inferred_from_the_shapes(tmp_path: Path) -> None:
    for published in (
        saved(ViTForImageClassification(their_config()), tmp_path),
        saved(ViTModel(their_config()), tmp_path),
    ):
        assert ViTConfig.model_validate(FORMATS["vit"].infer(published, {"heads": 2})) == CONFIG
