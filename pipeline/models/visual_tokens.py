"""Visual tokens (BEiT, arXiv 2106.08254, section 2.1): a frozen tokenizer names what stands at each patch.

The tokenizer is DALL-E's encoder, in Hugging Face's form (`FlavaImageCodebook`). A folder holds its `config.json` and
`model.safetensors`, as `FlavaImageCodebook.save_pretrained` writes and facebook/flava-image-codebook has them. DALL-E's
own names are read too; its `encoder.pkl` is a pickled module, which nothing here would load, so that its tensors have
to be saved once by themselves:

    safetensors.torch.save_file(dall_e.load_model("encoder.pkl", "cpu").state_dict(), "model.safetensors")

with a config.json of `{}`, the published sizes.

Shapes: B rows, H x W pixels, g x g grid, P = g² patches, T tokens of the vocabulary.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from pipeline.config.errors import CheckpointError
from pipeline.models.checkpoints.files import read_json, read_tensors
from pipeline.models.checkpoints.mismatch import require

PIXELS_PER_TOKEN = 8  # along a side: the encoder halves its picture three times
LOGIT_LAPLACE_MARGIN = 0.1  # DALL-E reads pixels in [0.1, 0.9]

_NAMES = (  # DALL-E's names for parts of Hugging Face's
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"(group_\d)\.(block_)", r"\1.group.\2"),
    (r"res_path\.(conv_)", r"res_path.path.\1"),
)


class VisualTokenizer(nn.Module):
    """Reads pictures at eight pixels a token, whatever their size, always in float32 and without gradient."""

    def __init__(self, encoder: FlavaImageCodebook) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).float().eval()

    @property
    def tokens(self) -> int:
        """How many it tells apart."""
        return int(self.encoder.config.vocab_size)

    @torch.no_grad()
    def forward(self, image: Tensor, grid: int) -> Tensor:
        """The token of each patch: image (B, H, W, 3) uint8 -> (B, P) int64 below `tokens`, patches row by row."""
        side = grid * PIXELS_PER_TOKEN
        pixels = rearrange(image, "b h w c -> b c h w").float() / 255
        with torch.autocast(image.device.type, enabled=False):
            if pixels.shape[2:] != (side, side):
                pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
            found = self.encoder.get_codebook_indices((1 - 2 * LOGIT_LAPLACE_MARGIN) * pixels + LOGIT_LAPLACE_MARGIN)
        return found.flatten(1)


def read_tokenizer(config: bytes, weights: bytes, origin: str) -> VisualTokenizer:
    """The tokenizer of a folder's config.json and tensors; CheckpointError, which names `origin`, if they disagree."""
    state = {_name(name): tensor for name, tensor in read_tensors(weights, origin).tensors.items()}
    section = _section(config, origin, most=len(state))
    try:
        with torch.device("meta"):  # before memory is taken for sizes that no tensor has
            shapes = {name: tuple(tensor.shape) for name, tensor in FlavaImageCodebook(section).state_dict().items()}
        require(state, shapes)
    except Exception as error:
        raise CheckpointError(f"{origin}: no tokenizer of this form (see config.json): {error}") from error
    with torch.random.fork_rng(devices=[]):  # building it draws weights, which are then replaced
        encoder = FlavaImageCodebook(section)
    encoder.load_state_dict(state)
    return VisualTokenizer(encoder)


def _section(config: bytes, origin: str, most: int) -> FlavaImageCodebookConfig:
    """The sizes that a config.json gives; of groups and their blocks at most as many as there are tensors."""
    try:
        given = read_json(config, "config.json")
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: its config.json cannot be read: {error}") from error
    if given.get("model_type", "flava_image_codebook") != "flava_image_codebook":
        raise CheckpointError(f"{origin}: its config.json is of another model; expected a flava_image_codebook")
    sizes = ("num_groups", "input_channels", "num_blocks_per_group", "hidden_size", "vocab_size")
    told = {key: given[key] for key in sizes if key in given}
    wrong = [key for key, value in told.items() if not isinstance(value, int) or value < 1]
    wrong += [key for key in ("num_groups", "num_blocks_per_group") if key in told and told[key] > most]
    if wrong:
        raise CheckpointError(
            f"{origin}: its config.json says {wrong[0]}={told[wrong[0]]!r}, which its tensors are not of"
        )
    return FlavaImageCodebookConfig(**told)


def _name(published: str) -> str:
    """Hugging Face's name of a tensor, also out of a whole FLAVA checkpoint."""
    name = published.removeprefix("image_codebook.")
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
