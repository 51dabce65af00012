"""Visual tokens (BEiT, arXiv 2106.08254, section 2.1): a frozen tokenizer gives each patch the target to predict.

The tokenizer is DALL-E's encoder as `config.json` and `model.safetensors` of a `FlavaImageCodebook`, such as
facebook/flava-image-codebook, or with DALL-E's own names. Its `encoder.pkl` is a pickled module, which is never loaded
here; save its tensors once:

    safetensors.torch.save_file(dall_e.load_model("encoder.pkl", "cpu").state_dict(), "model.safetensors")

with a config.json of `{}`, the published sizes.

Shapes: B examples, H x W pixels, g x g grid, P = g² patches.
"""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from pipeline.config.errors import CheckpointError
from pipeline.models.checkpoints.conversion import require
from pipeline.models.checkpoints.files import read_json, read_tensors

LOGIT_LAPLACE_MARGIN = 0.1  # DALL-E reads pixels in [0.1, 0.9]

_NAMES = (  # DALL-E's names for parts of Hugging Face's
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"(group_\d)\.(block_)", r"\1.group.\2"),
    (r"res_path\.(conv_)", r"res_path.path.\1"),
)


class VisualTokenizer(nn.Module):
    """Reads images at eight pixels per token, whatever their size, in float32 and without gradient."""

    def __init__(self, encoder: FlavaImageCodebook) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).float().eval()
        self.tokens = int(encoder.config.vocab_size)

    @torch.no_grad()
    def forward(self, image: Tensor, grid: int) -> Tensor:
        """Return the token of each patch, row by row: image (B, H, W, 3) uint8 -> (B, P) int64 below `tokens`."""
        side = 8 * grid  # the encoder halves its image three times
        pixels = rearrange(image, "b h w c -> b c h w").float() / 255
        with torch.autocast(image.device.type, enabled=False):
            if pixels.shape[2:] != (side, side):
                pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
            tokens = self.encoder.get_codebook_indices((1 - 2 * LOGIT_LAPLACE_MARGIN) * pixels + LOGIT_LAPLACE_MARGIN)
        return tokens.flatten(1)


def read_tokenizer(config: bytes, weights: bytes, origin: str) -> VisualTokenizer:
    """Build the tokenizer of a config.json and tensors. Raises CheckpointError naming `origin` if they disagree."""
    state = {}
    for published, tensor in read_tensors(weights, origin).tensors.items():
        name = published.removeprefix("image_codebook.")  # of a whole FLAVA checkpoint
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    try:
        stated = read_json(config, "config.json")
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: its config.json cannot be read: {error}") from error
    if stated.get("model_type", "flava_image_codebook") != "flava_image_codebook":
        raise CheckpointError(f"{origin}: its config.json is of another model; expected a flava_image_codebook")
    keys = ("num_groups", "input_channels", "num_blocks_per_group", "hidden_size", "vocab_size")
    sizes = {key: stated[key] for key in keys if key in stated}
    wrong = [key for key, value in sizes.items() if not isinstance(value, int) or value < 1]
    # A model has at most as many groups and blocks as tensors.
    wrong += [key for key in ("num_groups", "num_blocks_per_group") if key in sizes and sizes[key] > len(state)]
    if wrong:
        raise CheckpointError(
            f"{origin}: its config.json has {wrong[0]}={sizes[wrong[0]]!r}, which does not fit its tensors"
        )
    section = FlavaImageCodebookConfig(**sizes)
    try:
        with torch.device("meta"):  # before allocating memory for sizes that no tensor has
            shapes = {name: tuple(tensor.shape) for name, tensor in FlavaImageCodebook(section).state_dict().items()}
        require(state, shapes)
    except Exception as error:
        raise CheckpointError(f"{origin}: not a tokenizer of the form in its config.json: {error}") from error
    with torch.random.fork_rng(devices=[]):  # building it draws weights, which are then replaced
        encoder = FlavaImageCodebook(section)
    encoder.load_state_dict(state)
    return VisualTokenizer(encoder)
