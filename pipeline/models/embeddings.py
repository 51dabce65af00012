"""What enters the encoder: text tokens, image patches, and the positions both are told by.

Shapes: B rows, L tokens, P patches, I = 1 + P image tokens ([CLS] in front), or 1 + K where only K patches are read,
T longest text, D width, H heads, N layers, p side of a patch.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from pipeline.models.attention import gather

TEXT_EPSILON = 1e-12  # BERT's


class TextEmbedding(nn.Module):
    """BERT's embedding of tokens, then the vector that says "this is text"."""

    positions: nn.Parameter | None

    def __init__(
        self, vocabulary: int, width: int, max_text_length: int, absolute: bool, epsilon: float = TEXT_EPSILON
    ) -> None:
        super().__init__()
        self.max_text_length = max_text_length
        self.word = nn.Embedding(vocabulary, width)
        self.token_type = nn.Parameter(torch.empty(2, width))  # BERT's sentence A and B; A alone is read
        self.register_parameter("positions", nn.Parameter(torch.empty(max_text_length, width)) if absolute else None)
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.modality = nn.Parameter(torch.empty(width))

    def forward(self, text: Tensor) -> Tensor:
        """text (B, L) int64 -> (B, L, D)."""
        length = text.shape[1]
        if length > self.max_text_length:
            raise ValueError(
                f"a text of {length} tokens is longer than the model's positions reach ({self.max_text_length}); "
                "cut the text or raise model.max_text_length"
            )
        x = self.word(text) + self.token_type[0]
        if self.positions is not None:
            x = x + self.positions[:length]
        return self.norm(x) + self.modality


class ImageEmbedding(nn.Module):
    """Patches and [CLS], then the vector that says "this is an image", where texts are read too."""

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
        # Counted to the masked-image head, but used here, and ZeRO-3 gathers it for its owner only.
        self.register_parameter("mask", nn.Parameter(torch.empty(width)) if maskable else None)
        self.register_parameter("modality", nn.Parameter(torch.empty(width)) if modality else None)
        # The modality of the second of two pictures (NLVR2).
        self.register_parameter("second", nn.Parameter(torch.empty(width)) if second else None)

    def forward(
        self,
        image: Tensor,
        hidden: Tensor | None = None,
        is_second: Tensor | None = None,
        stand_ins: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """image (B, H, W, 3), uint8 or floats in [-1, 1] -> (B, I, D); `hidden` (B, P) bool covers patches.

        `is_second` (B,) bool says which pictures are the second of two. `stand_ins` (B, P) says which patch of the
        picture is shown at each place. With `read` (B, K) only those patches become tokens, in that order: (B, 1 + K,
        D); what stands where it is negative means nothing.
        """
        if image.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"an image batch of shape {tuple(image.shape)} does not fit the model, which reads "
                f"(rows, {self.image_size}, {self.image_size}, 3); resize the images or change model.image_size"
            )
        patches = self.cut(image)
        if read is not None:
            read = read.clamp(min=0)
            stand_ins = read if stand_ins is None else stand_ins.gather(1, read)
            hidden = None if hidden is None else hidden.gather(1, read)
        if stand_ins is not None:
            patches = gather(patches, stand_ins)
        x = self.project(patches, hidden)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
        if self.positions is not None:
            x = x + (self.positions if read is None else _positions_of(self.positions, read))
        return self.tell_modality(x, is_second)

    def cut(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, P, 3 p²), as they are: rearranging bytes moves a quarter of what floats would."""
        return rearrange(image, "b (h p) (w q) c -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)

    def project(self, patches: Tensor, hidden: Tensor | None) -> Tensor:
        """Patches (B, P, 3 p²), bytes or floats in [-1, 1] -> (B, P, D), the mask embedding where `hidden` (B, P)."""
        pixels = patches.to(self.cls.dtype)
        x = self.patch(pixels / 127.5 - 1.0 if patches.dtype == torch.uint8 else pixels)
        if hidden is None:
            return x
        if self.mask is None:
            raise ValueError("patches can be hidden only in a model built with an image target")
        return torch.where(hidden.unsqueeze(-1), self.mask, x)

    def tell_modality(self, x: Tensor, is_second: Tensor | None) -> Tensor:
        """Add to each token (B, I, D) the vector that says what it is of."""
        if self.modality is None:
            return x
        if is_second is None:
            return x + self.modality
        assert self.second is not None, "a model that reasons about two pictures has a vector for the second"
        return x + torch.where(is_second[:, None, None], self.second, self.modality)


def _positions_of(positions: Tensor, read: Tensor) -> Tensor:
    """The positions (I, D) of [CLS] and of the patches in `read` (B, K): (B, 1 + K, D)."""
    return nn.functional.embedding(nn.functional.pad(read + 1, (1, 0)), positions)


def read_padding(read: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds for [CLS] and for the patches in `read` (B, K), -1 where there is none: (B, 1 + K)."""
    return key_padding(nn.functional.pad(read >= 0, (1, 0), value=True), dtype)


def key_padding(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds for each key, from `keep` (B, L) bool: 0, or a huge negative where it is False.

    Finite, so that a row of nothing but padding gives numbers and not NaN; its exponential is exactly 0.
    """
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min / 2)


class RelativePositions(nn.Module):
    """A bias for every pair of tokens, by their distance; each layer and head has a column of one table.

    The table has three parts, whose rows are in the release's order: `image`, a row for each of the (2g - 1)² offsets
    on the g x g grid, then patch-from-[CLS], [CLS]-from-patch, [CLS]-[CLS]; `cross`, text to image and image to text;
    `text`, a row for each of the 2T - 3 distances between words, then the same three for the text's [CLS].
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
        """The bias of every layer (N, H, L, L) for sequences of `text_length` tokens, then the image if there is one.

        Longer padding adds rows and columns and changes none.
        """
        blocks = []
        if text_length:
            blocks.append(_look_up(self.text, self.text_index[:text_length, :text_length]))
        if with_image:
            blocks.append(_look_up(self.image, self.image_index))
        bias = blocks[0] if len(blocks) == 1 else self._join(*blocks)
        return rearrange(bias, "(n h) q k -> n h q k", n=self.layers)

    def _join(self, text: Tensor, image: Tensor) -> Tensor:
        to_image, to_text = self.cross[:, :, None, None].unbind(0)
        text_rows = torch.cat([text, to_image.expand(-1, text.shape[1], image.shape[1])], dim=2)
        image_rows = torch.cat([to_text.expand(-1, image.shape[1], text.shape[1]), image], dim=2)
        return torch.cat([text_rows, image_rows], dim=1)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table (R, C), index (Q, K) -> (C, Q, K)."""
    return rearrange(nn.functional.embedding(index, table), "q k c -> c q k").contiguous()


def image_distances(grid: int) -> Tensor:
    """The row of `RelativePositions.image` for each pair of image tokens: (I, I) int64, [CLS] first."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down = row[:, None] - row[None, :] + grid - 1
    across = column[:, None] - column[None, :] + grid - 1
    return _with_cls(down * (2 * grid - 1) + across, (2 * grid - 1) ** 2)


def text_distances(max_text_length: int) -> Tensor:
    """The row of `RelativePositions.text` for each pair of text tokens: (T, T) int64, [CLS] first."""
    place = torch.arange(max_text_length - 1)
    return _with_cls(place[None, :] - place[:, None] + max_text_length - 2, 2 * max_text_length - 3)


def _with_cls(index: Tensor, first_row: int) -> Tensor:
    """Put [CLS] in front: it reads others by row `first_row`, is read by the next, and reads itself by the third."""
    size = len(index) + 1
    joined = torch.empty(size, size, dtype=torch.int64)
    joined[1:, 1:] = index
    joined[0, :] = first_row
    joined[:, 0] = first_row + 1
    joined[0, 0] = first_row + 2
    return joined
