"""A stage's model, the parts it trains, and the weights it starts from.

A stage hands over weights, never optimizer state. Parts that its objectives do not use are frozen before the engine is
built: an idle but trainable expert would drift under Adam's momentum, and at ZeRO 3 be updated by stale gradients.
"""

from __future__ import annotations

import logging

from torch import Tensor

from pipeline.config.errors import CheckpointError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.randomness import hash64
from pipeline.data.storage import Storage
from pipeline.models import build_model, skeleton
from pipeline.models.model import Model
from pipeline.models.vlmo import copy_expert
from pipeline.objectives import check_objectives, head_config, trained_modules
from pipeline.training.checkpoint import Weights, load_weights, stage_url

log = logging.getLogger(__name__)


def check_stages(config: RunConfig) -> None:
    """Check that each stage's sources and model support its objectives, and that `freeze` names parts of the model.

    Raises ConfigError.
    """
    check_objectives(config)
    for index, stage in enumerate(config.stages):
        trained_parts(stage_skeleton(config, index), config, stage)


def stage_skeleton(config: RunConfig, index: int, vocabulary: int = 1) -> Model:
    """Build the model of stage `index` on the meta device."""
    return skeleton(config.for_stage(config.stages[index]).model, vocabulary, head_config(config, index))


def build_stage_model(config: RunConfig, index: int, storage: Storage, vocabulary: int) -> Model:
    """Build the model of stage `index` with its starting weights; parts it does not train are frozen."""
    stage = config.stages[index]
    section = config.for_stage(stage).model
    model = build_model(section, vocabulary, head_config(config, index), seed=hash64(config.seed, "weights"))
    start = starting_weights(config, index, storage)
    if start is not None:
        state = model.resize_state(start.tensors, start.config.model)
        load_matching(model, prepare_experts(model, state, stage), stage.name, start.absent)
    trained = trained_parts(model, config, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in trained)
    return model


def trained_parts(model: Model, config: RunConfig, stage: StageConfig) -> frozenset[str]:
    """Return the parts of the model that the stage's objectives use, except those in `freeze`."""
    return trained_modules(model, stage.objectives, config.source_type_of(stage)) - model.parts_named(stage.freeze)


def starting_weights(config: RunConfig, index: int, storage: Storage) -> Weights | None:
    """Load the weights that `start_from` refers to; None for random weights."""
    stage = config.stages[index]
    if stage.start_from == "random" or (stage.start_from == "previous" and index == 0):
        return None
    url = stage_url(config, index - 1) if stage.start_from == "previous" else stage.start_from
    return load_weights(storage, url)


def prepare_experts(model: Model, start: dict[str, Tensor], stage: StageConfig) -> dict[str, Tensor]:
    """Initialise the experts as the stage configures: random, a copy of another expert, or inherited."""
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
    """Load weights into the model; heads, and the parts in `absent`, may be missing or have another shape.

    Raises CheckpointError, listing the names that do not match, for weights of another architecture.
    """
    fresh = check_fit(model, state, f"stage {stage}", absent)
    if fresh:
        log.warning("stage %s: no weights of this shape to start from, initialised at random: %s", stage, _few(fresh))
    own = model.state_dict().keys() - set(fresh)
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)


def check_fit(model: Model, state: dict[str, Tensor], who: str, absent: frozenset[str] = frozenset()) -> list[str]:
    """Return the names that will keep their initial values, besides missing heads; `model` may be on the meta device.

    Raises CheckpointError as `load_matching` does; `who` begins its message.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    reshaped = sorted(name for name in state.keys() & own.keys() if state[name].shape != own[name].shape)
    faults = {
        "missing": [n for n in missing if model.part_of(n) not in {*model.HEAD_PARTS, *absent}],
        "unexpected": [n for n in sorted(state.keys() - own.keys()) if not _is_head(model, n)],
        "of another shape": [n for n in reshaped if model.part_of(n) not in model.HEAD_PARTS],
    }
    if any(faults.values()):
        mismatches = "; ".join(f"{kind}: {_few(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(
            f"{who} starts from weights of another architecture ({mismatches}); "
            "use the same `model` section as the run that trained them"
        )
    return reshaped + [name for name in missing if model.part_of(name) in absent]


def _is_head(model: Model, name: str) -> bool:
    """Return whether a name absent from this model belongs to a head that it could have."""
    try:
        return model.part_of(name) in model.HEAD_PARTS
    except (AssertionError, IndexError):
        return False


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
