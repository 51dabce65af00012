"""What a stage is made of: the model, the parts it trains, and the weights it starts from.

A stage hands over weights, never optimiser state. Parts that its objectives do not use are frozen before the engine
is built: an idle but trainable expert would drift under Adam's momentum, and at ZeRO 3 be moved by stale gradients.
"""

from __future__ import annotations

import logging

from torch import Tensor, nn

from pipeline.config.errors import CheckpointError
from pipeline.config.schema import ModelConfig, RunConfig, StageConfig
from pipeline.data.randomness import hash64
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.models.vlmo import ImageTarget, copy_expert, part_of, parts_named, parts_used
from pipeline.training.checkpoint import load_weights, stage_url

log = logging.getLogger(__name__)

HEAD_PARTS = ("contrastive_head", "matching_head", "masked_language_head", "masked_image_head", "pooler")


def check_stages(config: RunConfig) -> None:
    """What the schema cannot know: that every `freeze` names parts of the model. Raises ConfigError."""
    for stage in config.stages:
        parts_named(stage.freeze)


def build_stage_model(config: RunConfig, index: int, storage: Storage, vocabulary: int) -> nn.Module:
    """The model of stage `index`, with its starting weights, its unused and frozen parts frozen."""
    stage = config.stages[index]
    model = build_model(config.model, vocabulary, image_target(config, index), seed=hash64(config.seed, "weights"))
    start = starting_weights(config, index, storage)
    if start is not None:
        load_matching(model, prepare_experts(model.state_dict(), start, config, stage), config.model, stage.name)
    trained = trained_parts(config, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, config.model) in trained)
    return model


def image_target(config: RunConfig, index: int) -> ImageTarget | None:
    """The target of the masked-image head that a stage's model carries: that of the last stage to train it, if any."""
    trained = [stage.image_target for stage in config.stages[: index + 1] if "masked_image" in stage.objectives]
    return trained[-1] if trained else None


def trained_parts(config: RunConfig, stage: StageConfig) -> frozenset[str]:
    """The parts that the stage's objectives use and its `freeze` leaves free."""
    used = parts_used(frozenset(stage.objectives), frozenset({config.use_of(stage)}), config.model)
    return used - parts_named(stage.freeze)


def starting_weights(config: RunConfig, index: int, storage: Storage) -> dict[str, Tensor] | None:
    """What `start_from` names; None for random weights."""
    stage = config.stages[index]
    if stage.start_from == "random" or (stage.start_from == "previous" and index == 0):
        return None
    url = stage_url(config, index - 1) if stage.start_from == "previous" else stage.start_from
    return load_weights(storage, url).tensors


def prepare_experts(
    fresh: dict[str, Tensor], start: dict[str, Tensor], config: RunConfig, stage: StageConfig
) -> dict[str, Tensor]:
    """Give the experts that the config names their start: random, a copy of another expert, or kept as handed over."""
    prepared = dict(start)
    for target, source in (("language", stage.experts.language), ("vision_language", stage.experts.vision_language)):
        if source == "random":
            parts = parts_named([f"{target}_expert"])
            prepared |= {name: fresh[name] for name in fresh if part_of(name, config.model) in parts}
        elif source != "kept":
            prepared = copy_expert(prepared, source, target)  # type: ignore[arg-type]
    return prepared


def load_matching(model: nn.Module, state: dict[str, Tensor], config: ModelConfig, stage: str) -> None:
    """Load weights into the model; only heads may be absent or of another shape.

    Raises CheckpointError listing missing, unexpected and wrong-shaped names of another architecture.
    """
    own = model.state_dict()
    wrong = sorted(name for name in state.keys() & own.keys() if state[name].shape != own[name].shape)
    faults = {
        "missing": [name for name in sorted(own.keys() - state.keys()) if part_of(name, config) not in HEAD_PARTS],
        "unexpected": [name for name in sorted(state.keys() - own.keys()) if part_of(name, config) not in HEAD_PARTS],
        "of another shape": [name for name in wrong if part_of(name, config) not in HEAD_PARTS],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {_few(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(
            f"stage {stage} starts from weights of another architecture ({told}); "
            "give the same `model` section as the run that made them"
        )
    kept = {name: tensor for name, tensor in state.items() if name in own and name not in wrong}
    if wrong:
        log.warning("stage %s: heads of another shape start anew: %s", stage, _few(wrong))
    model.load_state_dict(kept, strict=False)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
