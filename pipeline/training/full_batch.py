"""A batch as large as a stage's rows can be, of invented content: what memory and speed are estimated and measured on.

Texts are as long as the stage allows, pictures have the stage's size (those that keep their shape, the model's
largest), and as many words, patches and regions are masked as the masking's shares give.

Shapes: B rows, L tokens, K masked places a row, R regions, F numbers of a region.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.config.schema import ImageBERTConfig, RunConfig, StageConfig, TransformerConfig, ViLTConfig
from pipeline.data.batch import Batch

SPECIAL_TOKENS = 2  # [CLS] and [SEP], which are never masked


def full_batch(
    config: RunConfig, stage: StageConfig, rows: int, vocabulary: int, text_tokens: int | None = None, step: int = 0
) -> Batch:
    """A whole global batch of `rows`; a function of its arguments alone.

    `text_tokens` is the length of every text, if it is not to be the longest that the stage allows.
    """
    config = config.for_stage(stage)
    draw = torch.Generator().manual_seed(step)
    source_type, section = config.source_type_of(stage), config.model
    members: dict[str, Tensor] = {}
    if source_type in ("pairs", "images", "labelled", "questions", "statements"):
        members |= _pictures(section, stage, rows, draw)
    if section.READS_TEXT and source_type in ("pairs", "text", "regions", "questions", "statements"):
        members |= _texts(
            stage, rows, min(text_tokens or stage.max_text_length, stage.max_text_length), vocabulary, draw
        )
    if source_type == "regions":
        assert isinstance(section, ImageBERTConfig), "no other kind reads regions"
        members |= _regions(section, stage, rows, draw)
    if source_type == "statements":
        members["second_image"] = members["image"].flip(0)
        if "image_size" in members:
            members["second_image_size"] = members["image_size"]
            members.pop("visible_patches", None)  # of two pictures all patches are read
        members["label"] = torch.arange(rows) % 2
    if source_type == "labelled":
        members["label"] = torch.arange(rows) % (stage.num_classes or 2)
    if source_type == "questions":
        members["answers"] = torch.arange(rows)[:, None] % (stage.num_answers or 2)
        members["answer_scores"] = torch.ones(rows, 1)
    return Batch(
        step=step,
        place=torch.arange(rows),
        uid=torch.arange(rows),
        image_id=torch.arange(rows),
        source=torch.zeros(rows, dtype=torch.int64),
        **members,
    )


def _pictures(section: TransformerConfig, stage: StageConfig, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    members: dict[str, Tensor] = {}
    height = width = section.image_size
    read = section.num_patches
    if isinstance(section, ViLTConfig):
        height, width = (side // section.patch_size * section.patch_size for side in (height, section.longest_side))
        patches = height * width // section.patch_size**2
        read = min(section.max_visible_patches or patches, patches)
        members["image_size"] = torch.tensor([[height, width]]).repeat(rows, 1)
        if section.max_visible_patches is not None:
            members["visible_patches"] = torch.arange(read).repeat(rows, 1)
    members["image"] = torch.randint(0, 256, (rows, height, width, 3), dtype=torch.uint8, generator=draw)
    masked = max(1, round(stage.masking.image_mask_ratio * read))
    members["patch_positions"] = torch.stack([torch.randperm(read, generator=draw)[:masked] for _ in range(rows)])
    if stage.masking.mask_token_prob < 1:
        members["patch_replacements"] = torch.full_like(members["patch_positions"], -1)
    return members


def _texts(stage: StageConfig, rows: int, length: int, vocabulary: int, draw: torch.Generator) -> dict[str, Tensor]:
    first = min(vocabulary - 1, SPECIAL_TOKENS + 3)
    text = torch.randint(first, vocabulary, (rows, length), generator=draw)
    words = length - SPECIAL_TOKENS
    masked = min(
        words, 2 * math.ceil(stage.masking.mlm_probability * words)
    )  # as if the masked words had two pieces each
    positions = 1 + torch.stack([torch.randperm(length - SPECIAL_TOKENS, generator=draw)[:masked] for _ in range(rows)])
    return {
        "text": text,
        "text_keep": torch.ones(rows, length, dtype=torch.bool),
        "masked_text": text.scatter(1, positions, first),
        "mask_positions": positions,
        "mask_labels": text.gather(1, positions),
    }


def _regions(section: ImageBERTConfig, stage: StageConfig, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    count = section.max_regions
    masked = max(1, round(stage.masking.region_mask_ratio * count))
    positions = torch.stack([torch.randperm(count, generator=draw)[:masked] for _ in range(rows)])
    return {
        "region_features": torch.rand(rows, count, section.region_features, generator=draw),
        "region_location": torch.rand(rows, count, 5, generator=draw),
        "region_keep": torch.ones(rows, count, dtype=torch.bool),
        "region_class": torch.randint(0, section.region_classes, (rows, count), generator=draw),
        "region_positions": positions,
        "region_hidden": torch.zeros(rows, count, dtype=torch.bool).scatter(1, positions, True),
    }
