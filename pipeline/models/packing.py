"""Several passes of one kind as one run through the layers, and what each head reads of it found again.

Shapes: B rows (of all passes), L longest text, I image tokens ([CLS] in front), K positions read, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.attention import gather
from pipeline.models.forward import ForwardInput, Head, Regions

WHOLE = ("tokens", "alignment", "decoded_image")  # heads that read every position
FIRST = ("itc", "itm", "classes", "answers", "nlvr2", "ranking")  # heads that read the first position


class PackedInputs:
    """The rows of some passes joined, texts and pictures padded to the longest. A pass with two images is two rows."""

    def __init__(self, passes: list[ForwardInput]) -> None:
        for one in passes:
            _check(one)
        self._pieces: list[ForwardInput] = []
        self._pieces_of: list[range] = []  # by pass
        for one in passes:
            pieces = _pieces(one)
            self._pieces_of.append(range(len(self._pieces), len(self._pieces) + len(pieces)))
            self._pieces.extend(pieces)
        self._sizes = [len(_anchor(piece)) for piece in self._pieces]
        self.branches = "itc" in passes[0].heads
        self.image = _joined_images([piece.image for piece in self._pieces])
        self.image_size = None if self.image is None else self._image_sizes()
        self.visible_patches = _joined([piece.visible_patches for piece in self._pieces], value=-1)
        self.is_second = self._is_second(passes)
        self.text = _joined([piece.text for piece in self._pieces], value=0)
        texts_kept = [_text_keep(piece) for piece in self._pieces if piece.text is not None]
        self.text_keep = _joined(texts_kept, value=False)
        self.regions = _joined_regions([piece.regions for piece in self._pieces])
        self.drop_path_mask = _joined([piece.drop_path_mask for piece in self._pieces])
        self._read = [self._positions(piece) for piece in self._pieces]
        self._whole = any(head in piece.heads for piece in self._pieces for head in WHOLE)
        joined = [torch.cat(list(positions.values()), dim=1) for positions in self._read if positions]
        # Positions in the sequence that heads read, (B, K); None where a head reads them all.
        self.output_positions = None if self._whole else _joined(joined, value=0)

    def __len__(self) -> int:
        return sum(self._sizes)

    def masked(self, num_patches: int) -> Tensor | None:
        """Which patches are covered: (B, P) bool; None where none is in any pass."""
        if not any(_covers(piece) for piece in self._pieces):
            return None
        return torch.cat([_hidden(piece, num_patches) for piece in self._pieces])

    def replacements(self, num_patches: int) -> Tensor | None:
        """Which patch of the picture is shown at each place: (B, P) int64; None where each shows its own."""
        if all(piece.patch_replacements is None for piece in self._pieces):
            return None
        return torch.cat([_stand_ins(piece, num_patches) for piece in self._pieces])

    def find(self, features: Tensor, index: int, head: Head) -> Tensor:
        """What a head of the index-th pass reads, out of the features of all rows: (B, K, D)."""
        return torch.cat([self._find(features, piece, head) for piece in self._pieces_of[index]], dim=1)

    def _find(self, features: Tensor, index: int, head: Head) -> Tensor:
        first = sum(self._sizes[:index])
        mine = features[first : first + self._sizes[index]]
        if head in WHOLE:
            return self._without_padding(mine, index)
        if self._whole:
            return gather(mine, self._read[index][head])
        column = 0
        for name, positions in self._read[index].items():
            if name == head:
                return mine[:, column : column + positions.shape[1]]
            column += positions.shape[1]
        raise AssertionError(f"head {head} was not read")

    def _positions(self, piece: ForwardInput) -> dict[str, Tensor]:
        """Where in the sequence each head of a pass reads: (B, K)."""
        positions: dict[str, Tensor] = {}
        for head in piece.heads:
            if head in FIRST:
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
            whole = torch.tensor(piece.image.shape[1:3], device=piece.image.device)
            sizes.append(whole.expand(len(piece.image), 2) if piece.image_size is None else piece.image_size)
        return torch.cat(sizes)

    def _is_second(self, passes: list[ForwardInput]) -> Tensor | None:
        """Which rows are the second picture of a statement about two: (B,) bool; None where none is."""
        if all(one.second_image is None for one in passes):
            return None
        flags = [
            torch.full((self._sizes[piece],), place == 1, device=_anchor(self._pieces[piece]).device)
            for pieces in self._pieces_of
            for place, piece in enumerate(pieces)
        ]
        return torch.cat(flags)

    def _without_padding(self, x: Tensor, index: int) -> Tensor:
        """The tokens of a pass without what joining added to its text, or to its regions."""
        one = self._pieces[index]
        if self.text is not None and one.regions is not None:
            x = x[:, : self.text.shape[1] + one.regions.keep.shape[1]]
        if self.text is None or one.text is None or one.text.shape[1] == self.text.shape[1]:
            return x
        return torch.cat([x[:, : one.text.shape[1]], x[:, self.text.shape[1] :]], dim=1)


def grouped(passes: dict[str, ForwardInput]) -> dict[tuple, dict[str, ForwardInput]]:
    """Passes that can share a run: of one kind and branching, of like pictures, with drop path in all or none."""
    groups: dict[tuple, dict[str, ForwardInput]] = {}
    for name, one in passes.items():
        image = None
        if one.image is not None:
            shape = None if one.image_size is not None else one.image.shape[1:]  # pictures that differ are padded
            image = (shape, one.image.dtype, one.visible_patches is None)
        key = (image, one.regions is None, one.text is None, "itc" in one.heads, one.drop_path_mask is None)
        groups.setdefault(key, {})[name] = one
    return groups


def _pieces(one: ForwardInput) -> list[ForwardInput]:
    if one.second_image is None:
        return [one]
    first = replace(one, second_image=None, second_image_size=None)
    return [first, replace(first, image=one.second_image, image_size=one.second_image_size)]


def _check(one: ForwardInput) -> None:
    """A pass whose members do not serve its heads is refused, by name."""
    kind = "an image" if one.text is None else "a text" if one.image is None and one.regions is None else "a fused"
    if one.image is None and one.text is None:
        raise ValueError("a pass needs an image, a text, or both; regions are read with a text")
    if one.second_image is not None and one.visible_patches is not None:
        raise ValueError("of two pictures all patches are read; leave out visible_patches")
    fused = one.text is not None and (one.image is not None or one.regions is not None)
    masks_regions = one.text is not None and one.regions is not None and one.region_positions is not None
    serves: dict[Head, bool] = {
        "itc": not fused,
        "mlm": one.text is not None and one.mask_positions is not None,
        "mim": one.image is not None and one.patch_positions is not None,
        "decoded_image": one.text is None and one.patch_positions is not None and one.visible_patches is not None,
        "moc": masks_regions,
        "mrfr": masks_regions,
        "classes": one.text is None,
        "nlvr2": fused and one.second_image is not None,
        "tokens": True,
    }
    for head in one.heads:
        if not serves.get(head, fused):
            raise ValueError(
                f"head '{head}' cannot read {kind} pass with these members; see ForwardInput for what it needs"
            )


def _hidden(piece: ForwardInput, num_patches: int) -> Tensor:
    assert piece.image is not None
    hidden = torch.zeros(len(piece.image), num_patches + 1, dtype=torch.bool, device=piece.image.device)
    if piece.patch_positions is not None and _covers(piece):
        covered = True if piece.patch_replacements is None else piece.patch_replacements < 0
        hidden = hidden.scatter(1, _or_beyond(piece.patch_positions, num_patches), covered)
    return hidden[:, :-1]


def _covers(piece: ForwardInput) -> bool:
    """Whether the encoder reads an embedding in place of masked patches; a decoder's are left out altogether."""
    return piece.patch_positions is not None and "decoded_image" not in piece.heads


def _stand_ins(piece: ForwardInput, num_patches: int) -> Tensor:
    assert piece.image is not None
    own = torch.arange(num_patches + 1, device=piece.image.device).expand(len(piece.image), -1)
    if piece.patch_positions is not None and piece.patch_replacements is not None:
        shown = torch.where(piece.patch_replacements < 0, piece.patch_positions, piece.patch_replacements)
        own = own.scatter(1, _or_beyond(piece.patch_positions, num_patches), shown)
    return own[:, :-1]


def _or_beyond(positions: Tensor, num_patches: int) -> Tensor:
    """The positions, and one behind all patches in place of -1, which is padding."""
    return positions.where(positions >= 0, num_patches)


def _anchor(one: ForwardInput) -> Tensor:
    """A member that the pass surely has: its rows and device are the pass's."""
    member = one.image if one.text is None else one.text
    assert member is not None
    return member


def _text_keep(one: ForwardInput) -> Tensor:
    assert one.text is not None
    return torch.ones_like(one.text, dtype=torch.bool) if one.text_keep is None else one.text_keep


def _joined_images(images: list[Tensor | None]) -> Tensor | None:
    """All pictures, padded with zeros at the bottom and right to the tallest and widest."""
    given = [image for image in images if image is not None]
    if not given:
        return None
    height, width = max(i.shape[1] for i in given), max(i.shape[2] for i in given)
    padded = [
        i if i.shape[1:3] == (height, width) else F.pad(i, (0, 0, 0, width - i.shape[2], 0, height - i.shape[1]))
        for i in given
    ]
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def _joined_regions(regions: list[Regions | None]) -> Regions | None:
    """All regions, padded to the row with most."""
    given = [each for each in regions if each is not None]
    if not given:
        return None
    if len(given) == 1:
        return given[0]
    most = max(each.keep.shape[1] for each in given)
    missing = [most - each.keep.shape[1] for each in given]
    return Regions(
        features=torch.cat([F.pad(each.features, (0, 0, 0, n)) for each, n in zip(given, missing, strict=True)]),
        location=torch.cat([F.pad(each.location, (0, 0, 0, n)) for each, n in zip(given, missing, strict=True)]),
        keep=torch.cat([F.pad(each.keep, (0, n)) for each, n in zip(given, missing, strict=True)]),
    )


def _joined(members: list[Tensor | None] | list[Tensor], value: float | None = None) -> Tensor | None:
    """The rows of all members; with `value`, dimension 1 is padded to the longest. None if there are none."""
    tensors = [member for member in members if member is not None]
    if not tensors:
        return None
    if value is not None:
        longest = max(t.shape[1] for t in tensors)
        tensors = [t if t.shape[1] == longest else F.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
