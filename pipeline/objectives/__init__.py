"""Training objectives: one module each, with a loss (arithmetic on tensors) and one subclass of `Objective`.

To add one, add a module of its name here: the config schema lists this folder, and the rest of the system reads the
class's declarations, which can be all that it needs (`vqa`). Objectives of one stage may use the same forward, which
then runs once with all heads. An objective sums its loss over the examples that it reads and divides by nothing: the
step divides by the counts of the whole global batch (contract C2).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import OBJECTIVES, RunConfig, SourceType, StageConfig, TransformerConfig
from pipeline.data.batch import FIELDS, IGNORED, Batch
from pipeline.models.forward import ForwardInput, ForwardOutput, Head, InputKind, Regions
from pipeline.models.model import HeadConfig, Model

ImageTokenizer = Callable[[Tensor, int], Tensor]  # images (n, H, W, 3) uint8 and the grid's side -> (n, P) token ids
DropPathMask = Callable[[Batch, str], Tensor | None]  # examples and a forward's name -> the branches to keep

# The fields that move together when an example gets another's image or text, with their padding.
VISUAL, TEXT = (
    {name: spec.padding or 0 for name, spec in FIELDS.items() if spec.modality == modality}
    for modality in ("vision", "language")
)
SOURCE_INPUTS: dict[SourceType, frozenset[InputKind]] = {
    "text": frozenset({"text"}),
    "regions": frozenset({"regions", "text"}),
    **dict.fromkeys(("images", "labelled"), frozenset({"image"})),
    **dict.fromkeys(("pairs", "questions", "statements"), frozenset({"image", "text"})),
}


class ObjectiveContext(NamedTuple):
    """Settings shared by the objectives of a stage."""

    stage: StageConfig
    source_type: SourceType
    seed: int  # of the stage
    patch_size: int
    image_tokenizer: ImageTokenizer | None  # only for `image_target: visual_tokens`
    drop_path_mask: DropPathMask


class NegativePool(NamedTuple):
    """The global batch, from which negatives are drawn."""

    image_id: Tensor  # (B,)
    source: Tensor  # (B,)
    image: Tensor | None = None  # (B, D) detached unit vectors of ITC, if the stage trains it
    text: Tensor | None = None
    scale: Tensor | None = None


class RowSwap(NamedTuple):
    """For each example the place in the global batch of the example whose `fields` replace its own; -1 keeps them."""

    fields: dict[str, float]  # names of batch fields and their padding values
    places: Tensor  # (n,) int64


def require(tensor: Tensor | None) -> Tensor:
    """Return a batch field that the loader must have filled."""
    assert tensor is not None, "the loader fills the batch fields that the stage's objectives declare"
    return tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over all labels except -100; logits (…, C), labels (…) int64 or bool."""
    flat, targets = logits.float().flatten(0, -2), labels.flatten().long()
    return F.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")


class Objective:
    """One objective of a stage. `examples` are those that it reads in a step."""

    source_types: ClassVar[frozenset[SourceType]]
    head: ClassVar[Head]
    shared_heads: ClassVar[dict[str, Head]] = {}  # objective -> the head that it adds to this one's forwards
    evaluations: ClassVar[dict[SourceType, str]] = {}  # source type -> evaluation task that measures the objective
    fields: ClassVar[frozenset[str]] = frozenset()  # groups of batch fields beyond the inputs of the forwards
    required: ClassVar[dict[str, str]] = {}  # keys that the stage must set -> what they are
    forward_name: ClassVar[str] = ""  # of the one forward over all inputs; empty: see `forwards`
    reads_masked: ClassVar[bool] = False  # that forward reads masked text and regions
    loss_function: ClassVar[Callable[..., Tensor]] = staticmethod(cross_entropy)  # of the head's output and `targets`
    targets: ClassVar[tuple[str, ...]] = ()  # batch fields
    counted: ClassVar[str] = ""  # batch field whose numbers from 0 are the loss's summands; empty: the examples
    compares_similarity: ClassVar[bool] = False  # hard negatives, two per example, are drawn by ITC similarity
    towers: ClassVar[tuple[frozenset[InputKind], ...]] = ()  # the inputs of each forward, if no forward fuses them
    # Of a stage: the members of `HeadConfig` that give the model the objective's head, where it is optional.
    head_options: ClassVar[Callable[..., dict[str, Any]]] = staticmethod(lambda stage: {})

    def __init__(self, context: ObjectiveContext):
        self.context, self.stage = context, context.stage
        self.heads = (self.head, *(head for name, head in self.shared_heads.items() if name in self.stage.objectives))
        self.needs_similarity = self.compares_similarity and self.stage.negatives == "hard"  # towers must run first

    @classmethod
    def inputs(cls, source_type: SourceType, model: TransformerConfig) -> tuple[frozenset[InputKind], ...]:
        """Return the inputs of each kind of forward; by default one forward fuses all that the source has."""
        return cls.towers or (SOURCE_INPUTS[source_type],)

    @staticmethod
    def faults(config: RunConfig, stage: StageConfig) -> Iterable[str]:
        """Return what the stage lacks or contradicts besides `required`, as 'KEY: message' relative to the stage."""
        return ()

    def count(self, examples: Batch) -> Tensor | int:
        """Return the number of summands of the loss."""
        if self.counted:
            return (require(getattr(examples, self.counted)) >= 0).sum()
        return 3 * len(examples) if self.needs_similarity else len(examples)

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        """Return the forwards over the examples by name. A forward's name seeds its drop-path mask."""
        return {self.forward_name: self.fusion_forward(examples, self.forward_name)} if self.forward_name else {}

    def swaps(self, examples: Batch, pool: NegativePool) -> dict[str, list[RowSwap]]:
        """Return the swaps that make negatives, by the name of the fusion forward that reads them."""
        return {}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        """Return the loss summed over the examples (0-d)."""
        targets = [require(getattr(examples, field)) for field in self.targets]
        return type(self).loss_function(outputs[self.forward_name][self.head], *targets)

    def diagnostics(self, outputs: ForwardOutput, examples: Batch) -> dict[str, Tensor]:
        """Return detached 0-d sums over the examples that show whether the objective is learned."""
        return {}

    def fusion_forward(self, examples: Batch, name: str) -> ForwardInput:
        """Return a forward over everything that the examples have: text and images or regions."""
        masked, regions, features = self.reads_masked, None, examples.region_features
        if features is not None:
            if masked and examples.region_hidden is not None:
                features = features.masked_fill(examples.region_hidden.unsqueeze(-1), 0.0)
            regions = Regions(features, require(examples.region_location), require(examples.region_keep))
        shared = ("image", "image_size", "visible_patches", "second_image", "second_image_size", "text_keep")
        return ForwardInput(
            heads=self.heads,
            regions=regions,
            text=examples.masked_text if masked and examples.masked_text is not None else examples.text,
            mask_positions=examples.mask_positions if masked else None,
            region_positions=examples.region_positions if masked else None,
            drop_path_mask=self.context.drop_path_mask(examples, name),
            **{field: getattr(examples, field) for field in shared},
        )


def region_loss(
    loss: Callable[[Tensor, Tensor], Tensor], predicted: Tensor, values: Tensor, positions: Tensor
) -> Tensor:
    """Return the loss of the predictions (n, K, …) to values (n, R, …) of the regions at positions (n, K) from 0."""
    example, number = torch.nonzero(positions >= 0, as_tuple=True)
    return loss(predicted[example, number], values[example, positions[example, number]])


class MaskedRegionObjective(Objective):
    """An objective on masked regions of true pairs, with MLM's forward (ImageBERT, section 3.3: conditional mask)."""

    source_types = frozenset({"regions"})
    fields = frozenset({"masked_regions"})
    forward_name, reads_masked, counted = "masked", True, "region_positions"


def objective_type(name: str) -> type[Objective]:
    """Import an objective's module and return its one subclass of `Objective`."""
    module = import_module(f"{__name__}.{name}")
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__)
    return next(kind for kind in kinds if issubclass(kind, Objective))


def objective_types(stage: StageConfig) -> dict[str, type[Objective]]:
    """Return the stage's objectives in alphabetical order, which all ranks share."""
    return {name: objective_type(name) for name in OBJECTIVES if name in stage.objectives}


def batch_groups(config: RunConfig, stage: StageConfig) -> frozenset[str]:
    """Return the groups of batch fields that the stage's objectives read."""
    source_type, kinds = config.source_type_of(stage), objective_types(stage).values()
    groups = frozenset[str]().union(*(kind.fields.union(*kind.inputs(source_type, config.model)) for kind in kinds))
    return (
        groups | {"patch_replacements"} if "masked_patches" in groups and stage.masking.mask_token_prob < 1 else groups
    )


def head_config(config: RunConfig, index: int) -> HeadConfig:
    """Return the optional heads of a stage's model: those of its own objectives and of all earlier stages."""
    heads = HeadConfig(bounds_scales=not config.reproduce_vlmo_release)
    for stage in config.stages[: index + 1]:
        for kind in objective_types(stage).values():
            heads = replace(heads, **kind.head_options(stage))
    return heads


def modules_for(model: Model, objective: str, source_type: SourceType) -> frozenset[str] | None:
    """Return the parts of the model that an objective trains, or None if the model does not support it."""
    kind = objective_type(objective)
    if source_type not in kind.source_types:
        return None
    parts = [model.modules_for(inputs, kind.head) for inputs in kind.inputs(source_type, model.config)]
    return None if None in parts else frozenset[str]().union(*filter(None, parts))


def trained_modules(model: Model, objectives: Iterable[str], source_type: SourceType) -> frozenset[str]:
    """Return the parts that get a gradient from the objectives. Raises ConfigError if one is not supported."""
    trained: set[str] = set()
    for name in objectives:
        parts = modules_for(model, name, source_type)
        if parts is None:
            readable = [other for other in get_args(SourceType) if modules_for(model, name, other) is not None]
            raise ConfigError(
                f"objective '{name}' needs sources of type {' or '.join(readable)}, and the stage's sources are "
                f"{source_type}; add such a source or drop the objective"
                if readable
                else f"a model of kind '{model.config.kind}' does not learn objective '{name}'; "
                "`mome objectives` lists the supported combinations"
            )
        trained |= parts
    return frozenset(trained)


def evaluation_tasks(stage: StageConfig | None, source_type: SourceType) -> frozenset[str]:
    """Return the evaluation tasks that measure the objectives of a stage, or any for None, on a source of that type."""
    kinds = [objective_type(name) for name in OBJECTIVES if stage is None or name in stage.objectives]
    return frozenset(kind.evaluations[source_type] for kind in kinds if source_type in kind.evaluations)


def check_objectives(config: RunConfig) -> None:
    """Raise ConfigError listing every objective that its stage's sources or other keys do not support."""
    faults = []
    for stage in config.stages:
        source_type, kinds, prefix = config.source_type_of(stage), objective_types(stage), f"stages.{stage.name}"
        for name, kind in kinds.items():
            if source_type not in kind.source_types:
                expected = " or ".join(sorted(kind.source_types))
                needs = f"{name} needs sources of type {expected}, and the stage's are of type {source_type}"
                faults.append(f"{prefix}.objectives: {needs}")
            for key, meaning in kind.required.items():
                if getattr(stage, key) is None:
                    faults.append(f"{prefix}.{key}: required by the {name} objective; set {meaning}")
            faults += [f"{prefix}.{fault}" for fault in kind.faults(config, stage)]
        masked = [name for name, kind in kinds.items() if kind.forward_name == "masked"]
        if len({stage.objectives[name].every for name in masked}) > 1:
            sharing = f"{', '.join(masked)} share one forward over masked examples"
            faults.append(f"{prefix}.objectives: {sharing}; set the same `every`")
    held_out = config.evaluation.source
    if held_out is not None and not evaluation_tasks(None, kind_of := config.sources[held_out].type):
        evaluated = (source_type for source_type in get_args(SourceType) if evaluation_tasks(None, source_type))
        expected = f"expected a source of type {', '.join(evaluated)}"
        faults.append(f"evaluation.source: '{held_out}' is of type {kind_of}; {expected}")
    if faults:
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError(f"{config.name}: {count}\n" + "\n".join(faults))
