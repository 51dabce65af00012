"""BEiT-3 by its paper (arXiv 2208.10442), Magneto's (arXiv 2210.06423) and the names of its release, in plain PyTorch.

Image tokens come first; A is vision and B language. Shapes: B examples, I image tokens ([CLS] in front), T words,
D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-5


def random_state(width: int, layers: int, grid: int, patch: int, words: int) -> dict[str, Tensor]:
    """Return random weights under the names and in the shapes of a checkpoint of the release, with its retrieval heads.

    Each requires a gradient but for those that no forward reads.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "beit3.text_embed.weight": (words, width),
        "beit3.vision_embed.proj.weight": (width, 3, patch, patch),
        "beit3.vision_embed.proj.bias": (width,),
        "beit3.vision_embed.cls_token": (1, 1, width),
        "beit3.vision_embed.mask_token": (1, 1, width),
        "beit3.encoder.embed_positions.A.weight": (grid**2 + 3, width),
        "beit3.encoder.embed_positions.B.weight": (1024, width),
        "vision_head.weight": (width, width),
        "language_head.weight": (width, width),
        "logit_scale": (),
    }
    linear = {f"self_attn.{part}_proj.{{}}": (width, width) for part in ("q", "k", "v", "out")}
    linear |= {"ffn.{}.fc1": (2 * width, width), "ffn.{}.fc2": (width, 2 * width)}
    norms = dict.fromkeys(("self_attn_layer_norm.{}", "self_attn.inner_attn_ln.{}", "final_layer_norm.{}"), width)
    norms |= {"ffn.{}.ffn_layernorm": 2 * width}
    for letter in "AB":
        for last in ("weight", "bias"):
            shapes[f"beit3.encoder.layer_norm.{letter}.{last}"] = (width,)
        for layer in range(layers):
            for name, shape in (linear | {name: (size,) for name, size in norms.items()}).items():
                module = f"beit3.encoder.layers.{layer}.{name.format(letter)}"
                shapes |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return {name: tensor.requires_grad_("mask_token" not in name) for name, tensor in state.items()}


def features(
    state: dict[str, Tensor], heads: int, image: Tensor | None, text: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Return the final features (B, I + T, D) of normalised pixels (B, 3, H, W), texts (B, T), or both.

    `keep` (B, T) bool is False at the padding of texts.
    """
    parts: list[tuple[str, Tensor]] = []
    if image is not None:
        weight, bias = (state[f"beit3.vision_embed.proj.{last}"] for last in ("weight", "bias"))
        patches = F.conv2d(image, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        patches = torch.cat([state["beit3.vision_embed.cls_token"].expand(len(image), -1, -1), patches], dim=1)
        parts.append(("A", patches + state["beit3.encoder.embed_positions.A.weight"][2 : 2 + patches.shape[1]]))
    if text is not None:
        words = F.embedding(text, state["beit3.text_embed.weight"])
        parts.append(("B", words + state["beit3.encoder.embed_positions.B.weight"][2 : 2 + text.shape[1]]))
    masks = [keep if letter == "B" and keep is not None else x.new_ones(x.shape[:2]).bool() for letter, x in parts]
    is_key = torch.cat(masks, dim=1)
    letters = [letter for letter, _ in parts]
    lengths = [tokens.shape[1] for _, tokens in parts]
    x = torch.cat([tokens for _, tokens in parts], dim=1)

    def multiway(x: Tensor, module: str, before: str) -> Tensor:
        """Apply each letter's module, a linear layer or, with one row of weights, a norm, to the tokens of its own."""
        outputs = []
        for letter, tokens in zip(letters, x.split(lengths, dim=1), strict=True):
            weight, bias = (state[f"{before}{module.format(letter)}.{last}"] for last in ("weight", "bias"))
            is_norm = weight.dim() == 1
            outputs.append(
                F.layer_norm(tokens, weight.shape, weight, bias, EPSILON) if is_norm else F.linear(tokens, weight, bias)
            )
        return torch.cat(outputs, dim=1)

    layer = 0
    while f"beit3.encoder.layers.{layer}.ffn.A.fc1.bias" in state:
        before = f"beit3.encoder.layers.{layer}."
        normed = multiway(x, "self_attn_layer_norm.{}", before)
        query, key, value = (
            multiway(normed, f"self_attn.{part}_proj.{{}}", before).unflatten(2, (heads, -1)).transpose(1, 2)
            for part in "qkv"
        )
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        weights = scores.masked_fill(~is_key[:, None, None, :], float("-inf")).softmax(dim=3)
        mixed = multiway((weights @ value).transpose(1, 2).flatten(2), "self_attn.inner_attn_ln.{}", before)
        x = x + multiway(mixed, "self_attn.out_proj.{}", before)
        hidden_units = F.gelu(multiway(multiway(x, "final_layer_norm.{}", before), "ffn.{}.fc1", before))
        x = x + multiway(multiway(hidden_units, "ffn.{}.ffn_layernorm", before), "ffn.{}.fc2", before)
        layer += 1
    return multiway(x, "layer_norm.{}", "beit3.encoder.")
