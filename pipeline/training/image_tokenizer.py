"""The tokenizer of a stage whose masked patches are named by visual tokens, from wherever its weights lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import StageConfig
from pipeline.data.storage import NotFound, Storage, join

if TYPE_CHECKING:
    from pipeline.models.visual_tokens import VisualTokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_image_tokenizer(stage: StageConfig, storage: Storage, device: torch.device) -> VisualTokenizer | None:
    """The tokenizer on a device; None where the stage needs none.

    Raises CheckpointError where there is no tokenizer, ConfigError where it has another number of tokens than given.
    """
    settings = stage.image_tokenizer
    if "mim" not in stage.objectives or stage.image_target != "visual_tokens" or settings is None:
        return None
    from pipeline.models.visual_tokens import read_tokenizer  # here: few stages need it, and its library loads slowly

    try:
        config, weights = (storage.read(join(settings.weights, name)) for name in (CONFIG, WEIGHTS))
    except NotFound as error:
        raise CheckpointError(f"{settings.weights}: no image tokenizer ({CONFIG}, {WEIGHTS}): {error}") from error
    tokenizer = read_tokenizer(config, weights, settings.weights)
    if tokenizer.tokens != settings.tokens:
        raise ConfigError(
            f"stage {stage.name}: image_tokenizer.tokens is {settings.tokens}, and {settings.weights} tells "
            f"{tokenizer.tokens} apart; give that number"
        )
    return tokenizer.to(device)
