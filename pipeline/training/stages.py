"""A stage of a run: its config, its model, the parts it trains, and the weights it starts from.

A stage hands over weights, never optimizer state. Parts that its objectives do not use are frozen before the engine is
built: an idle but trainable expert would drift under Adam's momentum, and at ZeRO 3 be updated by stale gradients.
"""

from __future__ import annotations

import logging
from textwrap import shorten
from typing import Any

from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.randomness import hash64
from pipeline.data.storage import Storage
from pipeline.models import build_model, skeleton
from pipeline.models.model import Model
from pipeline.objectives import check_objectives, head_config, trained_modules
from pipeline.training.checkpoint.weights import load_weights, stage_url

log = logging.getLogger(__name__)

SHOWN = 160  # characters of a list of names in a message


class Stage:
    """One stage of a run. Its steps count from 0; `run` is the run's config with the stage's overrides applied."""

    def __init__(self, run: RunConfig, index: int):
        self.run = run.for_stage(run.stages[index])
        self.index = index
        self.config = self.run.stages[index]
        self.name, self.steps = self.config.name, self.config.steps
        self.source_type = self.run.source_type_of(self.config)
        self.first_step = run.stage_start(index)  # over all stages
        self.url = stage_url(run, index)  # folder of the weights it hands over
        start, previous = self.config.start_from, stage_url(run, index - 1) if index else None
        self.start_url = {"random": None, "previous": previous}.get(start, start)  # of its starting weights

    def with_engine(self, **settings: Any) -> Stage:
        """Return the stage with other settings of the config's `engine` section."""
        return Stage(self.run.model_copy(update={"engine": self.run.engine.model_copy(update=settings)}), self.index)

    def is_checkpoint_step(self, step: int) -> bool:
        """Return whether to save after this step. The last step hands over weights instead."""
        return (step + 1) % self.run.checkpoint.every == 0 and step + 1 < self.steps

    def num_micro_batches(self, world_size: int) -> int:
        """Return the number of micro-batches of a step, the same on every rank: as few as their size limit allows."""
        limit = self.run.engine.micro_batch_size
        assert limit != "auto", "resolved before the stage begins (workload.with_micro_batch)"
        largest_share = -(-self.config.global_batch_size // world_size)
        return 1 if limit is None else -(-largest_share // limit)


def check_stages(config: RunConfig) -> None:
    """Raise ConfigError if a stage's sources or model lack what its objectives need, or `freeze` names no part."""
    check_objectives(config)
    for stage in (Stage(config, index) for index in range(len(config.stages))):
        try:
            freeze_untrained(stage_skeleton(stage), stage)
        except ConfigError as error:
            raise ConfigError(f"stages.{stage.name}: {error}") from error


def stage_skeleton(stage: Stage, vocabulary: int = 1) -> Model:
    """Build a stage's model on the meta device."""
    return skeleton(stage.run.model, vocabulary, head_config(stage.run, stage.index))


def build_stage_model(stage: Stage, storage: Storage, vocabulary: int) -> Model:
    """Build a stage's model with its starting weights; parts that it does not train are frozen."""
    heads, seed = head_config(stage.run, stage.index), hash64(stage.run.seed, "weights")
    model = build_model(stage.run.model, vocabulary, heads, seed=seed)
    if stage.start_url is not None:
        start = load_weights(storage, stage.start_url)
        state = model.resize_state(start.tensors, start.config.model)
        load_matching(model, prepare_experts(model, state, stage.config), stage.name, start.absent)
    freeze_untrained(model, stage)
    return model


def freeze_untrained(model: Model, stage: Stage) -> frozenset[str]:
    """Let only the parts that the stage's objectives use, except those in `freeze`, require a gradient; return them."""
    used = trained_modules(model, stage.config.objectives, stage.source_type)
    trained = used - model.parts_named(stage.config.freeze)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in trained)
    return trained


def prepare_experts(model: Model, start: dict[str, Tensor], stage: StageConfig) -> dict[str, Tensor]:
    """Initialise the experts as the stage configures: random, a copy of another expert, or inherited.

    With routed attention, an expert includes its projections and norms. Raises ConfigError for one that is not there.
    """
    prepared = dict(start)
    for target, source in (("language", stage.experts.language), ("vision_language", stage.experts.vision_language)):
        if source == "inherit":
            continue
        parts, fresh = model.parts_named([f"{target}_expert"]), model.state_dict()
        if not (initial := {name: fresh[name] for name in fresh if model.part_of(name) in parts}):
            raise ConfigError(
                f"stages.{stage.name}.experts.{target} is {source!r}, and the model has no such expert "
                "(model.vision_language_layers is 0); remove the key"
            )
        prepared |= initial
        if source != "random":
            before, after = f".{source}.", f".{target}."
            prepared |= {name: prepared[name.replace(after, before)].clone() for name in prepared if after in name}
    return prepared


def load_matching(model: Model, state: dict[str, Tensor], stage: str, absent: frozenset[str] = frozenset()) -> None:
    """Load weights; heads may be missing or reshaped, parts in `absent` missing. Raises CheckpointError otherwise."""
    if fresh := check_fit(model, state, f"stage {stage}", absent):
        names = shorten(", ".join(fresh), SHOWN, placeholder=" …")
        log.warning("stage %s: %d weights have no start of their shape, set at random: %s", stage, len(fresh), names)
    own = model.state_dict().keys() - set(fresh)
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)


def check_fit(model: Model, state: dict[str, Tensor], who: str, absent: frozenset[str] = frozenset()) -> list[str]:
    """Return the names that keep initial values, besides missing heads; raise as `load_matching`, naming `who`."""
    own = model.state_dict()
    parts: dict[str, str] = {}
    for name in own.keys() | state.keys():
        try:
            parts[name] = model.part_of(name)
        except AssertionError:  # a name of another architecture
            parts[name] = ""
    missing = sorted(own.keys() - state.keys())
    reshaped = sorted(name for name in state.keys() & own.keys() if state[name].shape != own[name].shape)
    required, unexpected = [name for name in missing if parts[name] not in absent], sorted(state.keys() - own.keys())
    mismatches = [
        f"{len(names)} {fault}: {shorten(', '.join(names), SHOWN, placeholder=' …')}"
        for fault, all_names in (("missing", required), ("unexpected", unexpected), ("of another shape", reshaped))
        if (names := [name for name in all_names if parts[name] not in model.HEAD_PARTS])
    ]
    if mismatches:
        raise CheckpointError(
            f"{who} starts from weights of another architecture ({'; '.join(mismatches)}); "
            "use the same `model` section as the run that trained them"
        )
    return reshaped + [name for name in missing if parts[name] in absent]
