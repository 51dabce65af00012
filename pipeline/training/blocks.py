"""What the engine does to a model's transformer blocks: recompute their activations in the backward, or compile them.

Both change only how a block's forward runs; names, parameters and hooks stay.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.config.schema import EngineConfig
from pipeline.models.model import Model

COMPILED_VARIANTS = 1024  # of one block's code: layers x routes x passes with and without gradient


def prepare_blocks(model: Model, engine: EngineConfig) -> None:
    """Make the model's blocks run as the config says. Called once, before the model is given to DeepSpeed."""
    if engine.compile:
        # Beyond torch's limits a variant would run uncompiled, in silence; each layer's drop path alone makes one.
        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
        torch._dynamo.config.accumulated_recompile_limit = COMPILED_VARIANTS
    for block in model.transformer_blocks():
        if engine.compile:
            _replace_forward(block, torch.compile(block.forward))
        if engine.activation_checkpointing:
            _replace_forward(block, _recomputed(block, whole=engine.zero_stage == 3))


def _recomputed(block: nn.Module, whole: bool) -> Any:
    """The block's forward, of which only the inputs are kept, and which the backward runs again.

    Drop path is an input and so the same again; element dropout draws the same because the generator's state is kept
    too. `whole`: run it to the end, though the backward may need less, because ZeRO 3 gives back each module's weights
    when the module ends.
    """
    return partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=True, early_stop=not whole)


def _replace_forward(block: nn.Module, forward: Any) -> None:
    block.forward = forward
