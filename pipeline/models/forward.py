"""Named forward inputs and outputs, and inputs of one kind packed into a single run of the encoder.

    outputs = model({
        "image": ForwardInput(image=…, heads=("itc",)),
        "masked": ForwardInput(image=…, text=…, heads=("mlm",)),
    })
    outputs["masked"]["mlm"]

Inputs with an image only, a text only, or both (fused) differ only in their members, and the model routes by these. A
model draws no random numbers: `drop_path_mask` is an argument.

Shapes: B examples, L tokens, H x W pixels, P patches, R regions, F features of a region, K selected positions,
N layers, V vocabulary, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.multiway import gather

Head = (
    Literal["itc", "itm", "mlm", "mim", "decoded_image", "alignment", "moc", "mrfr"]
    | Literal["classes", "answers", "nlvr2", "ranking", "tokens"]
)
InputKind = Literal["image", "text", "regions"]
ForwardOutput = dict[str, dict[str, Tensor]]

ALL_POSITIONS = ("tokens", "alignment", "decoded_image")  # heads that read every position
ONE_POSITION = ("itc", "itm", "classes", "answers", "nlvr2", "ranking")  # heads that read the [CLS] or the end token


@dataclass(frozen=True)
class Regions:
    """A detector's regions of each image."""

    features: Tensor  # (B, R, F) float32; zeros where a region is masked
    location: Tensor  # (B, R, 5) float32: x1 / W, y1 / H, x2 / W, y2 / H, fraction of the image's area
    keep: Tensor  # (B, R) bool, False at padding


@dataclass(frozen=True)
class ForwardInput:
    """The tensors of one forward and the heads whose outputs are requested.

    Heads and their outputs; a model raises ValueError naming a head that it lacks:
      itc           image or text: `itc` (B, D), unit vectors, and `scale`, the exponentiated logit scale (0-d), so
                    that no parameter is read outside the engine's forward; VLMo adds `itc_vl` and `scale_vl`
      itm           fused: `itm` (B, 2), logits of (not matched, matched); a head with one logit z returns (0, z)
      mlm           text or fused: `mlm` (B, K, V), logits at `mask_positions`
      mim           image or fused: `mim` (B, K, targets), predictions at `patch_positions`
      decoded_image image whose `visible_patches` omit the masked ones: `mim` (B, K, targets), the image decoder's
                    predictions at `patch_positions` (MAE)
      alignment     fused: `words` (B, L, D) and `patches` (B, P, D), final features without the image's [CLS];
                    `words_keep` (B, L) bool, False at [CLS], [SEP] and padding; `patches_keep` (B, P) bool
      moc, mrfr     with regions: (B, K, classes) and (B, K, F), predictions at `region_positions`
      classes       image: `classes` (B, classes), logits
      answers       fused: `answers` (B, answers), logits
      nlvr2         fused with `second_image`: `nlvr2` (B, 2), logits of (false, true)
      ranking       fused: `ranking` (B,), higher for a better match
      tokens        any: `tokens`, final normalised features of every position (text first, then image with its [CLS])
    """

    heads: tuple[Head, ...]
    image: Tensor | None = None  # (B, H, W, 3) uint8
    image_size: Tensor | None = None  # (B, 2) int64: rows and columns of the canvas that hold the image; None: all
    # (B, K) int64: the patches that enter the encoder, padded with -1; None: all. Patches are numbered row by row over
    # the image itself, here and below, so that no number depends on the size of the canvas around it.
    visible_patches: Tensor | None = None
    second_image: Tensor | None = None  # (B, H, W, 3) uint8
    second_image_size: Tensor | None = None  # (B, 2) int64
    regions: Regions | None = None
    text: Tensor | None = None  # (B, L) int64
    text_keep: Tensor | None = None  # (B, L) bool, False at padding
    mask_positions: Tensor | None = None  # (B, K) int64: tokens that the mlm head reads
    patch_positions: Tensor | None = None  # (B, K) int64: masked patches, padded with -1
    patch_replacements: Tensor | None = None  # (B, K) int64: patch shown instead; -1: the mask embedding
    region_positions: Tensor | None = None  # (B, K) int64: regions that the region heads read
    drop_path_mask: Tensor | None = None  # (B, N, 2) bool: attention and feed-forward branches kept; None: all


def drop_masked_patches(forward_input: ForwardInput, num_patches: int) -> ForwardInput:
    """Return the input of a model with an image decoder: its encoder reads the unmasked patches in ascending order."""
    masked = forward_input.patch_positions
    assert masked is not None
    is_masked = torch.zeros(len(masked), num_patches, dtype=torch.uint8, device=masked.device).scatter(1, masked, 1)
    visible = is_masked.argsort(dim=1, stable=True)[:, : num_patches - masked.shape[1]]
    heads = tuple[Head, ...]("decoded_image" if head == "mim" else head for head in forward_input.heads)
    return replace(forward_input, heads=heads, visible_patches=visible)


class PackedInputs:
    """The examples of several inputs, padded to the longest text and largest image; two images are two pieces.

    Heads of one position read a text's last token if `reads_last_token`, else the [CLS] in front.
    """

    def __init__(self, inputs: list[ForwardInput], reads_last_token: bool = False) -> None:
        pieces: list[ForwardInput] = []
        self._pieces_of: list[range] = []  # by input
        for forward in inputs:
            _check(forward)
            own = [replace(forward, second_image=None, second_image_size=None)]
            if forward.second_image is not None:
                own.append(replace(own[0], image=forward.second_image, image_size=forward.second_image_size))
            self._pieces_of.append(range(len(pieces), len(pieces) + len(own)))
            pieces += own
        self._pieces = pieces
        members = [m for p in pieces if (m := p.image if p.text is None else p.text) is not None]  # one of each piece
        self._sizes, self._device = [len(member) for member in members], members[0].device

        self.branches = "itc" in inputs[0].heads
        self.image = _join(piece.image for piece in pieces)
        self.image_size: Tensor | None = None
        if any(piece.image_size is not None for piece in pieces):  # images without a size fill their canvas
            sides = [piece.image.shape[1:3] for piece in pieces if piece.image is not None]
            whole = [torch.tensor(s, device=self._device).expand(n, 2) for s, n in zip(sides, self._sizes, strict=True)]
            sizes = [piece.image_size for piece in pieces]
            self.image_size = torch.cat([w if own is None else own for own, w in zip(sizes, whole, strict=True)])
        self.visible_patches = _join((piece.visible_patches for piece in pieces), padding=-1)
        self.is_second: Tensor | None = None  # (B,) bool: the second image of a statement
        if len(pieces) > len(inputs):
            first = {numbers[0] for numbers in self._pieces_of}
            sizes_of = enumerate(self._sizes)
            self.is_second = torch.cat([torch.full((n,), i not in first, device=self._device) for i, n in sizes_of])
        self.text = _join(piece.text for piece in pieces)
        self.text_keep = _join(
            torch.ones_like(piece.text, dtype=torch.bool) if piece.text_keep is None else piece.text_keep
            for piece in pieces
            if piece.text is not None
        )
        regions = [piece.regions for piece in pieces if piece.regions is not None]
        joined = [_join(getattr(own, name) for own in regions) for name in ("features", "location", "keep")]
        self.regions = Regions(*(member for member in joined if member is not None)) if regions else None
        self.drop_path_mask = _join(piece.drop_path_mask for piece in pieces)

        # (B, K) by piece and head: positions that the head reads in a sequence of text, then image or regions.
        text = 0 if self.text is None else self.text.shape[1]
        self._positions: list[dict[Head, Tensor]] = []
        for piece, member in zip(pieces, members, strict=True):
            positions: dict[str, Tensor | None] = {"mlm": piece.mask_positions}
            position = member.new_zeros(len(member), 1, dtype=torch.int64)
            if reads_last_token and piece.text is not None:
                lengths = position + piece.text.shape[1] if piece.text_keep is None else piece.text_keep.sum(1, True)
                position = (lengths - 1).clamp(min=0)
            positions |= dict.fromkeys(ONE_POSITION, position)
            if "mim" in piece.heads and (patches := piece.patch_positions) is not None:
                if (visible := piece.visible_patches) is not None:
                    patches = (visible[:, None, :] == patches[:, :, None]).int().argmax(dim=2)
                positions["mim"] = patches.clamp(min=0) + 1 + text
            if piece.region_positions is not None:
                positions["moc"] = positions["mrfr"] = piece.region_positions.clamp(min=0) + text
            read = {head: positions[head] for head in piece.heads if head not in ALL_POSITIONS}
            self._positions.append({head: tensor for head, tensor in read.items() if tensor is not None})
        # (B, K): positions of the sequence that the heads read; None where a head reads all of them.
        self.output_positions: Tensor | None = None
        if not any(head in ALL_POSITIONS for piece in pieces for head in piece.heads):
            self.output_positions = _join(torch.cat(list(own.values()), dim=1) for own in self._positions if own)

    def masking(self, num_patches: int) -> tuple[Tensor | None, Tensor | None]:
        """Return where the mask embedding is, (B, P) bool, and the patch shown at each place, (B, P); or None each."""
        # With an image decoder, masked patches are left out instead.
        covers = [piece.patch_positions is not None and "decoded_image" not in piece.heads for piece in self._pieces]
        is_replaced = any(piece.patch_replacements is not None for piece in self._pieces)
        if not any(covers) and not is_replaced:
            return None, None
        masks, shown = [], []
        for piece, size, is_covered in zip(self._pieces, self._sizes, covers, strict=True):
            mask = torch.zeros(size, num_patches + 1, dtype=torch.bool, device=self._device)
            own = torch.arange(num_patches + 1, device=self._device).expand(size, -1)
            positions, replacements = piece.patch_positions, piece.patch_replacements
            if positions is not None:
                place = positions.where(positions >= 0, num_patches)  # padding falls behind all patches
                if is_covered:
                    mask = mask.scatter(1, place, True if replacements is None else replacements < 0)
                if replacements is not None:
                    own = own.scatter(1, place, torch.where(replacements < 0, positions, replacements))
            masks.append(mask[:, :-1])
            shown.append(own[:, :-1])
        return torch.cat(masks) if any(covers) else None, torch.cat(shown) if is_replaced else None

    def select(self, features: Tensor, index: int, head: Head) -> Tensor:
        """Return the features (B, K, D) that a head of the index-th input reads, out of those of all examples."""
        selected = []
        for number in self._pieces_of[index]:
            piece, positions, start = self._pieces[number], self._positions[number], sum(self._sizes[:number])
            own = features[start : start + self._sizes[number]]
            if head in ALL_POSITIONS:  # without those that packing added to its text or regions
                if self.text is not None and piece.regions is not None:
                    own = own[:, : self.text.shape[1] + piece.regions.keep.shape[1]]
                if self.text is not None and piece.text is not None and piece.text.shape[1] < self.text.shape[1]:
                    own = torch.cat([own[:, : piece.text.shape[1]], own[:, self.text.shape[1] :]], dim=1)
            elif self.output_positions is None:
                own = gather(own, positions[head])
            else:
                before = list(positions)[: list(positions).index(head)]
                column = sum(positions[name].shape[1] for name in before)
                own = own[:, column : column + positions[head].shape[1]]
            selected.append(own)
        return torch.cat(selected, dim=1)


def _check(inputs: ForwardInput) -> None:
    """Raise ValueError where an input's members do not serve its heads."""
    if inputs.image is None and inputs.text is None:
        raise ValueError("a forward input needs an image, a text, or both; regions are read with a text")
    if inputs.second_image is not None and inputs.visible_patches is not None:
        raise ValueError("two images are read with all their patches; leave out visible_patches")
    reads_text, masks_patches = inputs.text is not None, inputs.patch_positions is not None
    fused = reads_text and (inputs.image is not None or inputs.regions is not None)
    masks_regions = reads_text and inputs.regions is not None and inputs.region_positions is not None
    serves: dict[Head, bool] = {
        "itc": not fused,
        "mlm": reads_text and inputs.mask_positions is not None,
        "mim": inputs.image is not None and masks_patches,
        "decoded_image": not reads_text and masks_patches and inputs.visible_patches is not None,
        "moc": masks_regions,
        "mrfr": masks_regions,
        "classes": not reads_text,
        "nlvr2": fused and inputs.second_image is not None,
        "tokens": True,
    }
    kind = "a fused" if fused else "a text" if reads_text else "an image"
    for head in inputs.heads:
        if not serves.get(head, fused):
            raise ValueError(f"head '{head}' cannot read {kind} input with these members; see ForwardInput")


def _join(members: Iterable[Tensor | None], padding: float = 0) -> Tensor | None:
    """Concatenate tensors, each padded at the end of its other dimensions to the largest; None if there are none."""
    tensors = [member for member in members if member is not None]
    if not tensors:
        return None
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        amounts = [n for most, size in zip(largest, tensor.shape[1:], strict=True) for n in (most - size, 0)][::-1]
        padded.append(F.pad(tensor, amounts, value=padding) if any(amounts) else tensor)
    return padded[0] if len(padded) == 1 else torch.cat(padded)
