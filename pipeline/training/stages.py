"""What a stage is made of: the model, the parts it trains, and the weights it starts from.

A stage hands over weights, never optimiser state. Parts that its objectives do not use are frozen before the engine
is built: an idle but trainable expert would drift under Adam's momentum, and at ZeRO 3 be moved by stale gradients.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor

from pipeline.config.errors import CheckpointError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.randomness import hash64
from pipeline.data.storage import Storage
from pipeline.models import build_model, skeleton
from pipeline.models.model import HeadConfig, Model
from pipeline.models.vlmo import copy_expert
from pipeline.training.checkpoint import Weights, load_weights, stage_url

log = logging.getLogger(__name__)


def check_stages(config: RunConfig) -> None:
    """What the schema cannot know: that the model serves every objective, and `freeze` names its parts.

    Raises ConfigError.
    """
    for index, stage in enumerate(config.stages):
        trained_parts(stage_skeleton(config, index), config, stage)


def stage_skeleton(config: RunConfig, index: int, vocabulary: int = 1) -> Model:
    """The model of stage `index` without its weights."""
    return skeleton(config.for_stage(config.stages[index]).model, vocabulary, heads(config, index))


def build_stage_model(config: RunConfig, index: int, storage: Storage, vocabulary: int) -> Model:
    """The model of stage `index`, with its starting weights, its unused and frozen parts frozen."""
    stage = config.stages[index]
    section = config.for_stage(stage).model
    model = build_model(section, vocabulary, heads(config, index), seed=hash64(config.seed, "weights"))
    start = starting_weights(config, index, storage)
    if start is not None:
        state = model.resize_state(start.tensors, start.config.model)
        load_matching(model, prepare_experts(model, state, stage), stage.name, start.absent)
    trained = trained_parts(model, config, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in trained)
    return model


def heads(config: RunConfig, index: int) -> HeadConfig:
    """The heads that a stage's model carries: its own, and those of the stages before it as the last one made them."""
    found = HeadConfig(bounds_scales=not config.reproduce_vlmo_release)
    for stage in config.stages[: index + 1]:
        if "mim" in stage.objectives:
            tokens = stage.image_tokenizer.tokens if stage.image_tokenizer else 0
            found = replace(
                found, image_target=stage.image_target, visual_tokens=tokens, image_decoder=stage.image_decoder
            )
        if "classification" in stage.objectives:
            found = replace(found, classes=stage.num_classes)
        if "vqa" in stage.objectives:
            found = replace(found, answers=stage.num_answers)
        found = replace(found, reasoning=found.reasoning or "nlvr2" in stage.objectives)
        found = replace(found, ranking=found.ranking or "ranking" in stage.objectives)
    return found


def trained_parts(model: Model, config: RunConfig, stage: StageConfig) -> frozenset[str]:
    """The parts that the stage's objectives use and its `freeze` leaves free."""
    return model.parts_used(stage.objectives, config.source_type_of(stage)) - model.parts_named(stage.freeze)


def starting_weights(config: RunConfig, index: int, storage: Storage) -> Weights | None:
    """What `start_from` names; None for random weights."""
    stage = config.stages[index]
    if stage.start_from == "random" or (stage.start_from == "previous" and index == 0):
        return None
    url = stage_url(config, index - 1) if stage.start_from == "previous" else stage.start_from
    return load_weights(storage, url)


def prepare_experts(model: Model, start: dict[str, Tensor], stage: StageConfig) -> dict[str, Tensor]:
    """Give the experts that the config names their start: random, a copy of another expert, or kept as handed over."""
    prepared = dict(start)
    for target, source in (("language", stage.experts.language), ("vision_language", stage.experts.vision_language)):
        if source == "inherit":
            continue
        parts, fresh = model.parts_named([f"{target}_expert"]), model.state_dict()
        prepared |= {name: fresh[name] for name in fresh if model.part_of(name) in parts}
        if source != "random":
            prepared = copy_expert(prepared, source, target)  # type: ignore[arg-type]
    return prepared


def load_matching(model: Model, state: dict[str, Tensor], stage: str, absent: frozenset[str] = frozenset()) -> None:
    """Load weights into the model; heads may be absent or of another shape, and so may the parts named in `absent`.

    Raises CheckpointError listing missing, unexpected and wrong-shaped names of another architecture.
    """
    anew = check_fit(model, state, f"stage {stage}", absent)
    if anew:
        log.warning("stage %s: these have no weights of that shape, and start anew: %s", stage, _few(anew))
    own = model.state_dict().keys() - set(anew)
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)


def check_fit(model: Model, state: dict[str, Tensor], who: str, absent: frozenset[str] = frozenset()) -> list[str]:
    """The names that will start anew, besides the heads that the state lacks; `model` may be a skeleton.

    Raises CheckpointError as `load_matching`; `who` begins its message.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    wrong = sorted(name for name in state.keys() & own.keys() if state[name].shape != own[name].shape)
    faults = {
        "missing": [n for n in missing if model.part_of(n) not in {*model.HEAD_PARTS, *absent}],
        "unexpected": [n for n in sorted(state.keys() - own.keys()) if not _is_head(model, n)],
        "of another shape": [n for n in wrong if model.part_of(n) not in model.HEAD_PARTS],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {_few(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(
            f"{who} starts from weights of another architecture ({told}); "
            "give the same `model` section as the run that made them"
        )
    return wrong + [name for name in missing if model.part_of(name) in absent]


def _is_head(model: Model, name: str) -> bool:
    """Whether a name that this model lacks is of a head that it could have."""
    try:
        return model.part_of(name) in model.HEAD_PARTS
    except (AssertionError, IndexError):
        return False


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
