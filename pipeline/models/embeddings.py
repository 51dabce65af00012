"""Token embeddings of texts and images, and their absolute or relative positions.

Shapes: B examples, L tokens, P patches, I = 1 + P image tokens ([CLS] in front; 1 + K where K patches are visible),
T longest text, D width, H heads, N layers, p side of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.models.heads import TEXT_EPSILON
from pipeline.models.multiway import gather


class TextEmbedding(nn.Module):
    """BERT's token embedding with a modality vector added."""

    positions: nn.Parameter | None

    def __init__(
        self, vocabulary: int, width: int, max_text_length: int, absolute: bool, epsilon: float = TEXT_EPSILON
    ) -> None:
        super().__init__()
        self.max_text_length = max_text_length
        self.word = nn.Embedding(vocabulary, width)
        self.token_type = nn.Parameter(torch.empty(2, width))  # BERT's sentences A and B; only A is used
        self.register_parameter("positions", nn.Parameter(torch.empty(max_text_length, width)) if absolute else None)
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.modality = nn.Parameter(torch.empty(width))

    def forward(self, text: Tensor) -> Tensor:
        """text (B, L) int64 -> (B, L, D)."""
        length = text.shape[1]
        if length > self.max_text_length:
            raise ValueError(
                f"a text of {length} tokens is longer than the model's {self.max_text_length} positions; "
                "shorten the text or raise model.max_text_length"
            )
        x = self.word(text) + self.token_type[0]
        if self.positions is not None:
            x = x + self.positions[:length]
        return self.norm(x) + self.modality


class ImageEmbedding(nn.Module):
    """Patch projection with [CLS], positions, and a modality vector in models that also read text."""

    positions: nn.Parameter | None
    mask: nn.Parameter | None
    modality: nn.Parameter | None
    second: nn.Parameter | None

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        absolute: bool,
        maskable: bool,
        second: bool = False,
        modality: bool = True,
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.patch = nn.Linear(3 * patch_size**2, width)
        self.cls = nn.Parameter(torch.empty(width))
        count = 1 + (image_size // patch_size) ** 2
        self.register_parameter("positions", nn.Parameter(torch.empty(count, width)) if absolute else None)
        # Part of the masked-image head, but owned by its user: ZeRO-3 gathers a parameter only for its owner.
        self.register_parameter("mask", nn.Parameter(torch.empty(width)) if maskable else None)
        self.register_parameter("modality", nn.Parameter(torch.empty(width)) if modality else None)
        # The modality vector of the second image of a pair (NLVR2).
        self.register_parameter("second", nn.Parameter(torch.empty(width)) if second else None)

    def forward(
        self,
        image: Tensor,
        masked: Tensor | None = None,
        is_second: Tensor | None = None,
        replacements: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """image (B, H, W, 3), uint8 or floats in [-1, 1] -> (B, I, D).

        `masked` (B, P) bool puts the mask embedding in place of patches, `is_second` (B,) bool marks second images,
        `replacements` (B, P) is the patch shown at each place. With `visible` (B, K) only those patches become tokens,
        in that order: (B, 1 + K, D); the output where it is negative is meaningless.
        """
        if image.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"an image batch of shape {tuple(image.shape)} does not fit the model, which expects "
                f"(batch, {self.image_size}, {self.image_size}, 3); resize the images or change model.image_size"
            )
        patches = self.patchify(image)
        if visible is not None:
            visible = visible.clamp(min=0)
            replacements = visible if replacements is None else replacements.gather(1, visible)
            masked = None if masked is None else masked.gather(1, visible)
        if replacements is not None:
            patches = gather(patches, replacements)
        x = self.project(patches, masked)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
        if self.positions is not None and visible is None:
            x = x + self.positions
        elif self.positions is not None and visible is not None:
            x = x + F.embedding(F.pad(visible + 1, (1, 0)), self.positions)
        return self.add_modality(x, is_second)

    def patchify(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, P, 3 p²) without a change of type: moving bytes costs a quarter of moving floats."""
        return rearrange(image, "b (h p) (w q) c -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)

    def project(self, patches: Tensor, masked: Tensor | None) -> Tensor:
        """Patches (B, P, 3 p²), uint8 or floats in [-1, 1] -> (B, P, D), the mask embedding where `masked` (B, P)."""
        pixels = patches.to(self.cls.dtype)
        x = self.patch(pixels / 127.5 - 1.0 if patches.dtype == torch.uint8 else pixels)
        if masked is None:
            return x
        if self.mask is None:
            raise ValueError("patches can be masked only in a model built with an image target")
        return torch.where(masked.unsqueeze(-1), self.mask, x)

    def add_modality(self, x: Tensor, is_second: Tensor | None) -> Tensor:
        """Add the image's modality vector to each token (B, I, D)."""
        if self.modality is None:
            return x
        if is_second is None:
            return x + self.modality
        assert self.second is not None, "two images need a model built with nlvr2"
        return x + torch.where(is_second[:, None, None], self.second, self.modality)


def visible_padding(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the attention padding (B, 1 + K) of [CLS] and the patches `visible` (B, K), where -1 is padding."""
    return key_padding(F.pad(visible >= 0, (1, 0), value=True), dtype)


def key_padding(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the attention padding of each key from `keep` (B, L) bool: 0, or a huge negative value where False.

    It is finite, so that an example of nothing but padding gives numbers and not NaN; its exponential is exactly 0.
    """
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min / 2)


class RelativePositions(nn.Module):
    """An attention bias for each pair of tokens by their distance; each layer and head has a column of one table.

    The table has three parts with rows in the release's order: `image`, a row for each of the (2g - 1)² offsets on the
    g x g grid, then patch-from-[CLS], [CLS]-from-patch, [CLS]-[CLS]; `cross`, text to image and image to text; `text`,
    a row for each of the 2T - 3 distances between words, then the same three for the text's [CLS].
    """

    image_index: Tensor
    text_index: Tensor

    def __init__(self, layers: int, heads: int, grid: int, max_text_length: int) -> None:
        super().__init__()
        self.layers = layers
        self.image = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, layers * heads))
        self.cross = nn.Parameter(torch.zeros(2, layers * heads))
        self.text = nn.Parameter(torch.zeros(2 * max_text_length, layers * heads))
        self.register_buffer("image_index", image_distances(grid), persistent=False)
        self.register_buffer("text_index", text_distances(max_text_length), persistent=False)

    def forward(self, text_length: int, with_image: bool) -> Tensor:
        """Return the bias (N, H, L, L) of `text_length` tokens, followed by the image if there is one.

        Longer padding adds rows and columns and changes none.
        """
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


def image_distances(grid: int) -> Tensor:
    """Return the row of `RelativePositions.image` for each pair of image tokens: (I, I) int64, [CLS] first."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down = row[:, None] - row[None, :] + grid - 1
    across = column[:, None] - column[None, :] + grid - 1
    return _with_cls(down * (2 * grid - 1) + across, (2 * grid - 1) ** 2)


def text_distances(max_text_length: int) -> Tensor:
    """Return the row of `RelativePositions.text` for each pair of text tokens: (T, T) int64, [CLS] first."""
    position = torch.arange(max_text_length - 1)
    return _with_cls(position[None, :] - position[:, None] + max_text_length - 2, 2 * max_text_length - 3)


def _with_cls(index: Tensor, first_row: int) -> Tensor:
    """Prepend [CLS]: `first_row` for its attention to others, the next row for theirs to it, the third for itself."""
    size = len(index) + 1
    joined = torch.empty(size, size, dtype=torch.int64)
    joined[1:, 1:] = index
    joined[0, :] = first_row
    joined[:, 0] = first_row + 1
    joined[0, 0] = first_row + 2
    return joined
