"""Pack several forward inputs of one kind into a single run of the encoder, and select each head's features again.

Shapes: B examples (of all inputs), L longest text, P patches, K output positions, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.forward import ForwardInput, Head, Regions
from pipeline.models.multiway import gather

ALL_POSITIONS = ("tokens", "alignment", "decoded_image")  # heads that read every position
FIRST_POSITION = ("itc", "itm", "classes", "answers", "nlvr2", "ranking")  # heads that read the [CLS] in front


def group_inputs(inputs: dict[str, ForwardInput]) -> dict[tuple, dict[str, ForwardInput]]:
    """Group inputs that can share a run: the same modalities, image shape and branching, drop path in all or none."""
    groups: dict[tuple, dict[str, ForwardInput]] = {}
    for name, forward in inputs.items():
        image = None
        if forward.image is not None:
            shape = None if forward.image_size is not None else forward.image.shape[1:]  # images with a size are padded
            image = (shape, forward.image.dtype, forward.visible_patches is None)
        key = (
            image,
            forward.regions is None,
            forward.text is None,
            "itc" in forward.heads,
            forward.drop_path_mask is None,
        )
        groups.setdefault(key, {})[name] = forward
    return groups


class PackedInputs:
    """The examples of several inputs, padded to the longest text and largest image; two images are two pieces."""

    def __init__(self, inputs: list[ForwardInput]) -> None:
        self._pieces: list[ForwardInput] = []
        self._pieces_of: list[range] = []  # by input
        is_second: list[bool] = []  # by piece
        for forward in inputs:
            _check(forward)
            self._pieces_of.append(range(len(self._pieces), len(self._pieces) + 1 + (forward.second_image is not None)))
            first = replace(forward, second_image=None, second_image_size=None)
            self._pieces.append(first)
            is_second.append(False)
            if forward.second_image is not None:
                self._pieces.append(replace(first, image=forward.second_image, image_size=forward.second_image_size))
                is_second.append(True)
        pieces = self._pieces
        self._sizes = [len(_anchor(piece)) for piece in pieces]
        self.branches = "itc" in inputs[0].heads
        self.image = _join_images([piece.image for piece in pieces])
        self.image_size = None if self.image is None else self._image_sizes()
        self.visible_patches = _join([piece.visible_patches for piece in pieces], value=-1)
        flags = [
            torch.full((size,), flag, device=_anchor(piece).device)
            for piece, size, flag in zip(pieces, self._sizes, is_second, strict=True)
        ]
        self.is_second = torch.cat(flags) if any(is_second) else None  # (B,) bool: the second image of a statement
        self.text = _join([piece.text for piece in pieces], value=0)
        keeps = [
            torch.ones_like(piece.text, dtype=torch.bool) if piece.text_keep is None else piece.text_keep
            for piece in pieces
            if piece.text is not None
        ]
        self.text_keep = _join(keeps, value=False)
        self.regions = _join_regions([piece.regions for piece in pieces if piece.regions is not None])
        self.drop_path_mask = _join([piece.drop_path_mask for piece in pieces])
        self._positions = [self._head_positions(piece) for piece in pieces]
        self._reads_all = any(head in piece.heads for piece in pieces for head in ALL_POSITIONS)
        joined = [torch.cat(list(positions.values()), dim=1) for positions in self._positions if positions]
        # (B, K): positions of the sequence that the heads read; None where a head reads all of them.
        self.output_positions = None if self._reads_all else _join(joined, value=0)

    def __len__(self) -> int:
        return sum(self._sizes)

    def masked(self, num_patches: int) -> Tensor | None:
        """Return (B, P) bool, True where the mask embedding replaces a patch; None if no input masks patches."""
        if not any(_masks_patches(piece) for piece in self._pieces):
            return None
        masks = []
        for piece in self._pieces:
            assert piece.image is not None
            mask = torch.zeros(len(piece.image), num_patches + 1, dtype=torch.bool, device=piece.image.device)
            if piece.patch_positions is not None and _masks_patches(piece):
                value = True if piece.patch_replacements is None else piece.patch_replacements < 0
                mask = mask.scatter(1, _padding_last(piece.patch_positions, num_patches), value)
            masks.append(mask[:, :-1])
        return torch.cat(masks)

    def replacements(self, num_patches: int) -> Tensor | None:
        """Return (B, P) int64, the patch shown at each place; None where each place shows its own."""
        if all(piece.patch_replacements is None for piece in self._pieces):
            return None
        shown = []
        for piece in self._pieces:
            assert piece.image is not None
            own = torch.arange(num_patches + 1, device=piece.image.device).expand(len(piece.image), -1)
            if piece.patch_positions is not None and piece.patch_replacements is not None:
                replaced = torch.where(piece.patch_replacements < 0, piece.patch_positions, piece.patch_replacements)
                own = own.scatter(1, _padding_last(piece.patch_positions, num_patches), replaced)
            shown.append(own[:, :-1])
        return torch.cat(shown)

    def select(self, features: Tensor, index: int, head: Head) -> Tensor:
        """Return the features (B, K, D) that a head of the index-th input reads, out of those of all examples."""
        return torch.cat([self._select_piece(features, piece, head) for piece in self._pieces_of[index]], dim=1)

    def _select_piece(self, features: Tensor, index: int, head: Head) -> Tensor:
        start = sum(self._sizes[:index])
        own = features[start : start + self._sizes[index]]
        if head in ALL_POSITIONS:
            return self._without_padding(own, self._pieces[index])
        if self._reads_all:
            return gather(own, self._positions[index][head])
        column = 0
        for name, positions in self._positions[index].items():
            if name == head:
                return own[:, column : column + positions.shape[1]]
            column += positions.shape[1]
        raise AssertionError(f"head {head} was not requested")

    def _head_positions(self, piece: ForwardInput) -> dict[str, Tensor]:
        """Return the positions (B, K) in the packed sequence that each head of a piece reads."""
        positions: dict[str, Tensor] = {}
        for head in piece.heads:
            if head in FIRST_POSITION:
                anchor = _anchor(piece)
                positions[head] = torch.zeros(len(anchor), 1, dtype=torch.int64, device=anchor.device)
            elif head == "mlm":
                assert piece.mask_positions is not None
                positions[head] = piece.mask_positions
            elif head == "mim":
                assert piece.patch_positions is not None
                places = piece.patch_positions
                if piece.visible_patches is not None:
                    places = (piece.visible_patches[:, None, :] == places[:, :, None]).int().argmax(dim=2)
                positions[head] = places.clamp(min=0) + (1 if self.text is None else 1 + self.text.shape[1])
            elif head in ("moc", "mrfr"):
                assert piece.region_positions is not None
                assert self.text is not None
                positions[head] = piece.region_positions.clamp(min=0) + self.text.shape[1]
        return positions

    def _image_sizes(self) -> Tensor | None:
        if all(piece.image_size is None for piece in self._pieces):
            return None
        sizes = []
        for piece in self._pieces:
            assert piece.image is not None
            canvas = torch.tensor(piece.image.shape[1:3], device=piece.image.device)
            sizes.append(canvas.expand(len(piece.image), 2) if piece.image_size is None else piece.image_size)
        return torch.cat(sizes)

    def _without_padding(self, x: Tensor, piece: ForwardInput) -> Tensor:
        """Remove the positions that packing added to the text or regions of a piece."""
        if self.text is not None and piece.regions is not None:
            x = x[:, : self.text.shape[1] + piece.regions.keep.shape[1]]
        if self.text is None or piece.text is None or piece.text.shape[1] == self.text.shape[1]:
            return x
        return torch.cat([x[:, : piece.text.shape[1]], x[:, self.text.shape[1] :]], dim=1)


def _check(inputs: ForwardInput) -> None:
    """Raise ValueError where an input's members do not serve its heads."""
    if inputs.image is None and inputs.text is None:
        raise ValueError("a forward input needs an image, a text, or both; regions are read with a text")
    if inputs.second_image is not None and inputs.visible_patches is not None:
        raise ValueError("two images are read with all their patches; leave out visible_patches")
    fused = inputs.text is not None and (inputs.image is not None or inputs.regions is not None)
    masks_regions = inputs.text is not None and inputs.regions is not None and inputs.region_positions is not None
    serves: dict[Head, bool] = {
        "itc": not fused,
        "mlm": inputs.text is not None and inputs.mask_positions is not None,
        "mim": inputs.image is not None and inputs.patch_positions is not None,
        "decoded_image": inputs.text is None
        and inputs.patch_positions is not None
        and inputs.visible_patches is not None,
        "moc": masks_regions,
        "mrfr": masks_regions,
        "classes": inputs.text is None,
        "nlvr2": fused and inputs.second_image is not None,
        "tokens": True,
    }
    kind = "a fused" if fused else "an image" if inputs.text is None else "a text"
    for head in inputs.heads:
        if not serves.get(head, fused):
            raise ValueError(f"head '{head}' cannot read {kind} input with these members; see ForwardInput")


def _masks_patches(piece: ForwardInput) -> bool:
    """Return whether the encoder reads the mask embedding; with an image decoder, masked patches are left out."""
    return piece.patch_positions is not None and "decoded_image" not in piece.heads


def _padding_last(positions: Tensor, num_patches: int) -> Tensor:
    """Replace -1, the padding, by the position after all patches."""
    return positions.where(positions >= 0, num_patches)


def _anchor(inputs: ForwardInput) -> Tensor:
    """Return a member that every input has: its length and device are the input's."""
    member = inputs.image if inputs.text is None else inputs.text
    assert member is not None
    return member


def _join_images(images: list[Tensor | None]) -> Tensor | None:
    """Concatenate images, padded with zeros at the bottom and right to the tallest and widest."""
    present = [image for image in images if image is not None]
    if not present:
        return None
    height, width = max(i.shape[1] for i in present), max(i.shape[2] for i in present)
    padded = [
        i if i.shape[1:3] == (height, width) else F.pad(i, (0, 0, 0, width - i.shape[2], 0, height - i.shape[1]))
        for i in present
    ]
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def _join_regions(regions: list[Regions]) -> Regions | None:
    """Concatenate regions, padded to the example with most."""
    if len(regions) < 2:
        return regions[0] if regions else None
    longest = max(part.keep.shape[1] for part in regions)
    missing = [longest - part.keep.shape[1] for part in regions]
    return Regions(
        features=torch.cat([F.pad(part.features, (0, 0, 0, n)) for part, n in zip(regions, missing, strict=True)]),
        location=torch.cat([F.pad(part.location, (0, 0, 0, n)) for part, n in zip(regions, missing, strict=True)]),
        keep=torch.cat([F.pad(part.keep, (0, n)) for part, n in zip(regions, missing, strict=True)]),
    )


def _join(members: list[Tensor | None] | list[Tensor], value: float | None = None) -> Tensor | None:
    """Concatenate tensors, with `value` padding dimension 1 to the longest; None if there are none."""
    tensors = [member for member in members if member is not None]
    if not tensors:
        return None
    if value is not None:
        longest = max(t.shape[1] for t in tensors)
        tensors = [t if t.shape[1] == longest else F.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
