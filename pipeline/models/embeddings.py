"""Token embeddings of texts and images, and their absolute or relative positions.

Shapes: B examples, L tokens, P patches (of the canvas), I = 1 + P image tokens ([CLS] in front; 1 + K where K patches
are visible), T longest text, D width, H heads, N layers, p side of a patch.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.config.schema import TransformerConfig
from pipeline.models.forward import PackedInputs
from pipeline.models.model import HeadConfig
from pipeline.models.multiway import TEXT_EPSILON, gather
from pipeline.models.resize import resized_positions


class TextEmbedding(nn.Module):
    """BERT's token embedding with a modality vector added."""

    positions: nn.Parameter | None

    def __init__(
        self, vocabulary: int, width: int, max_text_length: int, absolute: bool = True, epsilon: float = TEXT_EPSILON
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.token_type = nn.Parameter(torch.empty(2, width))  # BERT's sentences A and B; only A is used
        self.register_parameter("positions", nn.Parameter(torch.empty(max_text_length, width)) if absolute else None)
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.modality = nn.Parameter(torch.empty(width))

    def forward(self, text: Tensor) -> Tensor:
        """text (B, L) int64 -> (B, L, D)."""
        x = self.word(text) + self.token_type[0]
        if self.positions is not None:
            x = x + self.positions[: text.shape[1]]
        return self.norm(x) + self.modality


class PlainTextEmbedding(nn.Module):
    """CLIP's token embedding: words and positions, without a norm."""

    def __init__(self, vocabulary: int, width: int, max_text_length: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(max_text_length, width))

    def forward(self, text: Tensor) -> Tensor:
        """text (B, L) int64 -> (B, L, D)."""
        return self.word(text) + self.positions[: text.shape[1]]


class ImageEmbedding(nn.Module):
    """Patch projection with [CLS], positions, and a modality vector in models that also read text.

    With `any_shape` (ViLT), images are at the top left of a canvas; the grid of positions is resized to each.
    """

    positions: nn.Parameter | None
    mask: nn.Parameter | None
    modality: nn.Parameter | None
    second: nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        heads: HeadConfig,
        absolute: bool = True,
        modality: bool = True,
        any_shape: bool = False,
        patch_bias: bool = True,
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.any_shape = config.image_size, config.patch_size, any_shape
        self.patch = nn.Linear(3 * config.patch_size**2, config.width, bias=patch_bias)
        mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
        self.divisor: float | Tensor = 255 * config.image_std[0]
        self.offset: float | Tensor = config.image_mean[0] / config.image_std[0]
        if len({*config.image_mean}) > 1 or len({*config.image_std}) > 1:  # in the order of a patch's pixels
            del self.divisor, self.offset
            self.register_buffer("divisor", (255 * std).repeat_interleave(config.patch_size**2), persistent=False)
            self.register_buffer("offset", (mean / std).repeat_interleave(config.patch_size**2), persistent=False)
        self.cls = nn.Parameter(torch.empty(config.width))
        # The mask embedding is part of the masked-image head, and the modality vector of a pair's second image of
        # NLVR2's, but owned by their user: ZeRO-3 gathers a parameter only for its owner. With an image decoder the
        # encoder never reads masked patches.
        is_masked = heads.image_target is not None and heads.image_decoder is None
        positions = nn.Parameter(torch.empty(1 + config.grid**2, config.width)) if absolute else None
        self.register_parameter("positions", positions)
        for name, exists in (("mask", is_masked), ("modality", modality), ("second", modality and heads.nlvr2)):
            self.register_parameter(name, nn.Parameter(torch.empty(config.width)) if exists else None)

    def forward(self, packed: PackedInputs) -> tuple[Tensor, Tensor]:
        """Embed images, or their visible patches in that order: (B, I, D), and a mask (B, I) of the real tokens."""
        image, visible, side = packed.image, packed.visible_patches, self.patch_size
        assert image is not None
        if not self.any_shape and image.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"an image batch of shape {tuple(image.shape)} does not fit the model, which expects "
                f"(batch, {self.image_size}, {self.image_size}, 3); resize the images or change model.image_size"
            )
        if image.dim() != 4 or image.shape[3] != 3 or any(pixels % side for pixels in image.shape[1:3]):
            raise ValueError(
                f"an image batch of shape {tuple(image.shape)} does not fit the model, which expects (batch, height, "
                f"width, 3) with sides that are multiples of {side}; crop or pad the images"
            )
        height, width = (pixels // side for pixels in image.shape[1:3])
        masked, shown = packed.masking(height * width)
        keep = torch.ones(len(image), height * width, dtype=torch.bool, device=image.device)
        if self.any_shape:
            if packed.image_size is not None:
                grid = packed.image_size // side
            else:
                grid = torch.tensor([[height, width]], device=image.device).expand(len(image), 2)
            if visible is None:
                visible = torch.arange(height * width, device=image.device).expand(len(image), -1)
            visible = visible.where(visible < grid.prod(dim=1, keepdim=True), -1)
        if visible is not None:
            keep = visible >= 0
            visible = visible.where(keep, 0)
            shown = visible if shown is None else shown.gather(1, visible)
            masked = None if masked is None else masked.gather(1, visible)
        # Moving bytes costs a quarter of moving floats.
        x = rearrange(image, "b (h p) (w q) c -> b (h w) (c p q)", p=side, q=side)
        if shown is not None:
            x = gather(x, canvas_patches(shown, grid, width) if self.any_shape else shown)
        pixels = x.to(self.cls.dtype)
        x = self.patch(pixels / self.divisor - self.offset if x.dtype == torch.uint8 else pixels)
        if masked is not None:
            if self.mask is None:
                raise ValueError("patches can be masked only in a model built with an image target")
            x = torch.where(masked.unsqueeze(-1), self.mask, x)
        if self.any_shape:
            assert self.positions is not None
            assert visible is not None
            x = x + resized_positions(self.positions[1:], visible, grid)
            x = torch.cat([(self.cls + self.positions[0]).expand(len(x), 1, -1), x], dim=1)
        else:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
            if self.positions is not None:
                at = self.positions if visible is None else F.embedding(F.pad(visible + 1, (1, 0)), self.positions)
                x = x + at
        keep = F.pad(keep, (1, 0), value=True)
        if self.modality is None:
            return x, keep
        if packed.is_second is None:
            return x + self.modality, keep
        assert self.second is not None, "two images need a model built with nlvr2"
        return x + torch.where(packed.is_second[:, None, None], self.second, self.modality), keep


def canvas_patches(patches: Tensor, grid: Tensor, width: int) -> Tensor:
    """Convert numbers of real patches (B, K) over images with `grid` (B, 2) to those over a canvas `width` wide."""
    columns = grid[:, 1:]
    return torch.div(patches, columns, rounding_mode="floor") * width + patches % columns


class RelativePositions(nn.Module):
    """An attention bias for each pair of tokens by their distance, of every layer and head: the columns of one table.

    It has three parts with rows in the release's order: `image`, a row for each of the (2g - 1)² offsets on the
    g x g grid, then patch-from-[CLS], [CLS]-from-patch, [CLS]-[CLS]; `cross`, text to image and image to text; `text`,
    a row for each of the 2T - 3 distances between words, then the same three for the text's [CLS].
    """

    image_index: Tensor  # (I, I) int64: the row of `image` for each pair of image tokens, [CLS] first
    text_index: Tensor  # (T, T) int64: the row of `text`

    def __init__(self, layers: int, heads: int, grid: int, max_text_length: int) -> None:
        super().__init__()
        self.layers = layers
        self.image = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, layers * heads))
        self.cross = nn.Parameter(torch.zeros(2, layers * heads))
        self.text = nn.Parameter(torch.zeros(2 * max_text_length, layers * heads))
        row, column = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
        down, across = (place[:, None] - place[None, :] + grid - 1 for place in (row, column))
        word = torch.arange(max_text_length - 1)
        apart = word[None, :] - word[:, None] + max_text_length - 2
        for name, index in (("image", down * (2 * grid - 1) + across), ("text", apart)):
            rows = len(self.get_parameter(name))
            joined = F.pad(index, (1, 0, 1, 0), value=rows - 3)  # [CLS] in front
            joined[:, 0] = rows - 2
            joined[0, 0] = rows - 1
            self.register_buffer(f"{name}_index", joined, persistent=False)

    def forward(self, text_length: int, with_image: bool) -> Tensor:
        """Return the bias (N, H, L, L) of `text_length` tokens, followed by the image if there is one."""
        tables = [(self.text, self.text_index[:text_length, :text_length])] if text_length else []
        tables += [(self.image, self.image_index)] if with_image else []
        # Tables (R, C) at indices (Q, K) -> (C, Q, K)
        parts = [rearrange(F.embedding(index, table), "q k c -> c q k").contiguous() for table, index in tables]
        bias = parts[0]
        if len(parts) == 2:
            text, image = parts
            to_image, to_text = self.cross[:, :, None, None].unbind(0)
            text_rows = torch.cat([text, to_image.expand(-1, text.shape[1], image.shape[1])], dim=2)
            image_rows = torch.cat([to_text.expand(-1, image.shape[1], text.shape[1]), image], dim=2)
            bias = torch.cat([text_rows, image_rows], dim=1)
        return rearrange(bias, "(n h) q k -> n h q k", n=self.layers)
