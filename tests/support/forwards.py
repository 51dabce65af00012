"""A tiny model of every kind and forward inputs for all of its heads; random weights of Hugging Face's models.

Shapes: ROWS examples, LENGTH tokens, 2 x 2 patches of 8 pixels (ViLT: 4 x 6, 6 x 4, 4 x 4 and 1 x 6), 4 regions.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import schema
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput, ForwardOutput, Head, Regions, drop_masked_patches
from pipeline.models.model import HeadConfig, Model

ROWS, LENGTH, VOCABULARY, PATCH, LAYERS = 4, 7, 23, 8, 4
SIZES = torch.tensor([[32, 48], [48, 32], [32, 32], [8, 48]])  # pixels of ViLT's images, on canvases of 48 x 48
_SIZES: dict[str, Any] = {"width": 24, "layers": LAYERS, "init_std": 0.02, "heads": 3, "mlp_ratio": 2}
_IMAGE: dict[str, Any] = _SIZES | {"image_size": 16, "patch_size": PATCH, "drop_path": 0.3}
_VLMO = schema.VLMoConfig(**_IMAGE, max_text_length=12, vision_language_layers=2, layer_scale=0.5)
_ABSOLUTE = _VLMO.model_copy(update={"positions": "absolute", "layer_scale": None})
_ROUTED = schema.VLMoConfig(
    **_IMAGE, max_text_length=12, layer_scale=None, positions="absolute", embeddings="plain", norm_eps=1e-5,
    vision_language_layers=0, contrasts=1, attention="routed", sub_norm=True,
)  # fmt: skip
_VILT = schema.ViLTConfig(**_IMAGE | {"image_size": 32}, longest_side=48, max_text_length=12)
_REGIONS: dict[str, Any] = {"region_features": 6, "region_classes": 5, "dropout": 0.0}
_FINE_TUNED: dict[str, Any] = {"image_target": "mean_colour", "answers": 4, "nlvr2": True}
_DECODED = HeadConfig("pixels", image_decoder=schema.ImageDecoderConfig(width=16, layers=2, heads=2), classes=3)
MODELS: dict[str, tuple[schema.TransformerConfig, HeadConfig]] = {
    "vlmo": (_VLMO, HeadConfig(**_FINE_TUNED, classes=3)),
    "vlmo_absolute": (_ABSOLUTE, HeadConfig(**_FINE_TUNED, classes=3)),
    "vlmo_routed": (_ROUTED, HeadConfig(**_FINE_TUNED, classes=3)),  # BEiT-3
    "vilt": (_VILT, HeadConfig(**_FINE_TUNED, ranking=True)),
    "vit": (schema.ViTConfig(**_IMAGE), HeadConfig("mean_colour", classes=3)),
    "vit_decoded": (schema.ViTConfig(**_IMAGE), _DECODED),
    "dual_encoder": (
        schema.DualEncoderConfig(
            **_IMAGE, max_text_length=12, text_width=24, text_layers=2, text_heads=2, embedding=10
        ),
        HeadConfig(),
    ),
    "imagebert": (schema.ImageBERTConfig(**_SIZES, max_text_length=12, **_REGIONS), HeadConfig()),
}


def lively_model(name: str) -> Any:
    """Build a model without parameters at special values, so that no effects cancel by chance."""
    config, heads = MODELS[name]
    model = build_model(config, VOCABULARY, heads)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def forwards(name: str) -> dict[str, ForwardInput]:
    """Return the same forwards at each call, for every head of the model; most of them with drop path."""
    generator = torch.Generator().manual_seed(0)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    is_vilt = name == "vilt"
    words = {"text": integers(VOCABULARY, ROWS, LENGTH)}
    words["text_keep"] = torch.arange(LENGTH) < torch.tensor([7, 5, 6, 3])[:, None]
    few_words = {name: tensor[:, :5] for name, tensor in words.items()}
    masked_words = {**words, "mask_positions": integers(3, ROWS, 2)}
    if name == "imagebert":
        features, location = (torch.rand(ROWS, 4, n, generator=generator) for n in (6, 5))
        regions = Regions(features, location, torch.arange(4) < torch.tensor([4, 3, 2, 1])[:, None])
        fewer, masked = Regions(*(t[:, :2] for t in vars(regions).values())), [[0, 3], [2, -1], [1, -1], [0, 0]]
        masked_regions = {"regions": regions, "region_positions": torch.tensor(masked)}
        return {
            "pair": ForwardInput(("itm",), **words, regions=regions),
            "masked": ForwardInput(("mlm", "moc", "mrfr"), **masked_words, **masked_regions),
            "fewer": ForwardInput(("itm",), **few_words, regions=fewer),
            "text": ForwardInput(("mlm",), **masked_words),
        }
    side = 48 if is_vilt else 16
    pixels = integers(256, ROWS, side, side, 3).to(torch.uint8)
    image: dict[str, Any] = {"image": pixels, "image_size": SIZES if is_vilt else None}
    counts = (SIZES // PATCH).prod(dim=1) if is_vilt else torch.tensor([4] * ROWS)
    patches = image | {"patch_positions": torch.stack([counts - 1, torch.tensor([0, 1, 2, 0])], dim=1)}
    mim = ForwardInput(("mim",), **patches)
    chosen: dict[str, ForwardInput]
    if name == "dual_encoder":
        chosen = {"image": ForwardInput(("itc",), **image), "text": ForwardInput(("itc",), **words)}
    elif name.startswith("vit"):
        hidden = drop_masked_patches(mim, 4) if name == "vit_decoded" else mim
        chosen = {"labelled": ForwardInput(("classes",), **image), "mim": hidden}
    elif is_vilt:
        chosen = {
            "pair": ForwardInput(("itm", "ranking", "answers"), **image, **words),
            "small": ForwardInput(("itm",), image=pixels[:, :24, :16], **few_words),
            "mim": mim,
            "masked": ForwardInput(("mlm", "mim"), **patches, **masked_words),
            "text": ForwardInput(("mlm",), **masked_words),
        }
    else:
        chosen = {
            "image": ForwardInput(("itc",), **image),
            "text": ForwardInput(("itc",), **words),
            "mim": mim,
            "masked_text": ForwardInput(("mlm",), **masked_words),
            "pair": ForwardInput(("itm", "mlm"), **image, **masked_words),
            "masked": ForwardInput(("mlm",), **image, **masked_words | few_words),
        }
    drop_path_mask = torch.rand(ROWS, LAYERS, 2, generator=generator) > 0.3
    chosen = {forward: replace(one, drop_path_mask=drop_path_mask) for forward, one in chosen.items()}
    if name.startswith("vlmo"):
        chosen["classes"] = ForwardInput(("classes",), **image)
        chosen["answers"] = ForwardInput(("answers",), **image, **words)
    if name.startswith("vlmo") or is_vilt:
        second = {"second_image": pixels.flip(0), "second_image_size": SIZES.flip(0) if is_vilt else None}
        chosen["nlvr2"] = ForwardInput(("nlvr2",), **image, **second, **words)
    return chosen


def examples(inputs: dict[str, ForwardInput], rows: slice) -> dict[str, ForwardInput]:
    """Return the inputs cut to some examples."""
    cut: dict[str, ForwardInput] = {}
    for name, one in inputs.items():
        members = {key: value[rows] for key, value in vars(one).items() if isinstance(value, Tensor)}
        regions = one.regions and Regions(*(tensor[rows] for tensor in vars(one.regions).values()))
        cut[name] = replace(one, **members, regions=regions)
    return cut


def values(outputs: ForwardOutput) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, result in outputs.items() for key, value in result.items()}


def assert_same(left: ForwardOutput, right: ForwardOutput) -> None:
    torch.testing.assert_close(values(left), values(right), rtol=1e-5, atol=1e-5)


def gradients(model: Model, outputs: ForwardOutput) -> dict[str, Tensor]:
    """Return the gradients of a weighted sum of all outputs, by parameter; those that get none are left out."""
    model.zero_grad()
    found = [value for value in values(outputs).values() if value.requires_grad]
    weighted = [(value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in found]
    torch.stack(weighted).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model: Model, one: ForwardInput, *heads: Head) -> Any:
    """Return the outputs of one forward by name; of a single head of `heads`, the output itself."""
    outputs = model({"one": replace(one, heads=heads) if heads else one})["one"]
    return outputs[heads[0]] if len(heads) == 1 else outputs


def randomised(model: Any) -> Any:
    """Draw all parameters at random, biases and norms too, so that each one affects the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """Save the model and return the tensors of its file under their published names."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")
