"""What a term is: one objective of the step's loss, told apart from the others.

A term gets the rows that it reads in this step, and divides nothing: the step divides by the whole global batch's
counts (contract C2). Contrast is no term: its loss needs all ranks' features at once (see `contrast`). Terms of one
stage may name the same pass; it is then read once, with the heads of both.

Shapes: n rows, B global batch, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.schema import SourceType, StageConfig
from pipeline.data.batch import Batch
from pipeline.data.randomness import hash64, uniform_array
from pipeline.models.forward import ForwardInput, ForwardOutput, Head, Regions
from pipeline.training.exchange import Exchange

ImageTokenizer = Callable[[Tensor, int], Tensor]  # pictures (n, H, W, 3) uint8 and a grid's side -> (n, P) tokens
Keeps = Callable[[Batch, str], Tensor | None]


@dataclass(frozen=True)
class Setting:
    """What a stage's terms share."""

    stage: StageConfig
    source_type: SourceType
    seed: int  # of the stage's own draws
    patch_size: int
    image_tokenizer: ImageTokenizer | None  # of a stage whose masked patches are named by visual tokens
    keeps: Keeps  # rows and a pass's name -> the branches that drop path keeps


@dataclass(frozen=True)
class Candidates:
    """What negatives are drawn from: all rows of the global batch."""

    image_id: Tensor  # (B,)
    source: Tensor  # (B,)
    image: Tensor | None = None  # (B, D) unit vectors of the contrast, detached, where the stage has one
    text: Tensor | None = None
    scale: Tensor | None = None


class Term:
    """One objective. `rows` are those that it reads in this step."""

    def __init__(self, setting: Setting):
        self.setting, self.stage = setting, setting.stage

    def count(self, rows: Batch) -> Tensor | int:
        """How many summands these rows add to the loss."""
        return len(rows)

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        """What it reads of the rows as they are."""
        return {}

    def exchanges(self, rows: Batch, candidates: Candidates) -> dict[str, list[Exchange]]:
        """What it reads of rows with another row's picture or text, by the name of the pass."""
        return {}

    def exchanged_pass(self, rows: Batch, name: str) -> ForwardInput:
        """The pass over rows that were exchanged as asked."""
        raise NotImplementedError(f"{type(self).__name__} asked for no exchange")

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        """Summed over the rows."""
        raise NotImplementedError

    def signs(self, outputs: ForwardOutput, rows: Batch) -> dict[str, Tensor]:
        """Beside the loss, what tells whether the objective is learnt: 0-d, summed over the rows, detached."""
        return {}

    def fused(self, rows: Batch, name: str, *heads: Head) -> ForwardInput:
        """Text and picture, or text and regions, read together."""
        return ForwardInput(
            heads=heads,
            image=rows.image,
            image_size=rows.image_size,
            visible_patches=rows.visible_patches,
            regions=regions_of(rows),
            text=rows.text,
            text_keep=rows.text_keep,
            drop_path_mask=self.setting.keeps(rows, name),
        )


def regions_of(rows: Batch, hidden: bool = False) -> Regions | None:
    """The rows' regions, the masked ones zeroed if `hidden`; None where the source has none."""
    if rows.region_features is None:
        return None
    features = rows.region_features
    if hidden and rows.region_hidden is not None:
        features = features.masked_fill(rows.region_hidden.unsqueeze(-1), 0.0)
    return Regions(features, present(rows.region_location), present(rows.region_keep))


def uniform_of(seed: int, rows: Batch, purpose: str, device: torch.device) -> Tensor:
    """A number in [0, 1) for each row: (n,) float32, decided by the step, the row's place and the purpose."""
    drawn = uniform_array(hash64(seed, rows.step, purpose), rows.place.numpy())
    return torch.from_numpy(drawn).to(device, torch.float32)


def present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the loader prepares what the stage's objectives read"
    return tensor
