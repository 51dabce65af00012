"""Token embeddings of texts and images, and their absolute or relative positions.

Shapes: B examples, L tokens, P patches, I = 1 + P image tokens ([CLS] in front; 1 + K where K patches are visible),
T longest text, D width, H heads, N layers, p side of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.models.multiway import TEXT_EPSILON, gather
from pipeline.models.packing import PackedInputs


class TextEmbedding(nn.Module):
    """BERT's token embedding with a modality vector added."""

    positions: nn.Parameter | None

    def __init__(
        self, vocabulary: int, width: int, max_text_length: int, absolute: bool, epsilon: float = TEXT_EPSILON
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

    def forward(self, packed: PackedInputs) -> Tensor:
        """Embed square images: (B, I, D).

        With visible patches, only those become tokens, in that order; the output where they are padding is meaningless.
        """
        image, visible = packed.image, packed.visible_patches
        assert image is not None
        if image.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"an image batch of shape {tuple(image.shape)} does not fit the model, which expects "
                f"(batch, {self.image_size}, {self.image_size}, 3); resize the images or change model.image_size"
            )
        patches = self.patchify(image)
        masked, replacements = packed.masking(patches.shape[1])
        if visible is not None:
            visible = visible.clamp(min=0)
            replacements = visible if replacements is None else replacements.gather(1, visible)
            masked = None if masked is None else masked.gather(1, visible)
        if replacements is not None:
            patches = gather(patches, replacements)
        x = self.project(patches, masked)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
        if self.positions is not None:
            positions = self.positions if visible is None else F.embedding(F.pad(visible + 1, (1, 0)), self.positions)
            x = x + positions
        return self.add_modality(x, packed.is_second)

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
        """Add the image's modality vector to each token (B, I, D); `is_second` (B,) bool marks second images."""
        if self.modality is None:
            return x
        if is_second is None:
            return x + self.modality
        assert self.second is not None, "two images need a model built with nlvr2"
        return x + torch.where(is_second[:, None, None], self.second, self.modality)


class RelativePositions(nn.Module):
    """An attention bias for each pair of tokens by their distance; each layer and head has a column of one table.

    The table has three parts with rows in the release's order: `image`, a row for each of the (2g - 1)² offsets on the
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
