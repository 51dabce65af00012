"""What every kind of model is to the trainer: named passes in, features by name out, parameters in named parts.

A kind says which heads it has, which parts each objective reads, and how rows of one kind become features; joining
passes into few runs through the layers, and finding each head's features again, is done here for all.

Shapes: B rows, K positions whose features a head reads, D width.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ImageDecoderConfig, ImageTarget, Objective, SourceType, TransformerConfig
from pipeline.models.forward import ForwardInput, ForwardOutput, Head
from pipeline.models.heads import INITIAL_SCALE
from pipeline.models.multiway import MultiwayBlock
from pipeline.models.packing import PackedInputs, grouped

COLOUR_CLASSES = 512  # three bits a channel


@dataclass(frozen=True)
class HeadConfig:
    """What a stage, not the model's section, says of the heads; None or False builds no such head."""

    image_target: ImageTarget | None = None
    visual_tokens: int = 0  # that the tokenizer of `image_target` tells apart
    image_decoder: ImageDecoderConfig | None = None
    classes: int | None = None
    answers: int | None = None
    reasoning: bool = False
    ranking: bool = False
    bounds_scales: bool = True  # of the contrast; VLMo's release has that commented out

    @property
    def covers_patches(self) -> bool:
        """Whether the encoder reads an embedding in place of masked patches; a decoder's it does not read at all."""
        return self.image_target is not None and self.image_decoder is None

    def image_targets(self, patch_size: int) -> int:
        """Numbers that the masked-image head predicts for a patch; 0 without one."""
        if self.image_target is None:
            return 0
        sizes = {"mean_colour": COLOUR_CLASSES, "pixels": 3 * patch_size**2, "visual_tokens": self.visual_tokens}
        return sizes[self.image_target]


class Model(nn.Module, ABC):
    # A name stands for itself and for all that begin with it and a dot: "vision_expert" freezes both halves.
    PARTS: ClassVar[tuple[str, ...]]
    HEAD_PARTS: ClassVar[tuple[str, ...]]  # those that may start anew when weights are loaded into a stage
    RESIZABLE: ClassVar[frozenset[str]] = frozenset()  # keys of the section that `resize_state` bridges
    BLOCK: ClassVar[type[nn.Module]] = MultiwayBlock

    def __init__(self, config: TransformerConfig, heads: HeadConfig) -> None:
        super().__init__()
        self.config, self.heads = config, heads

    def forward(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        """Every pass's features under its own name; `ForwardInput` says what the heads return."""
        outputs: ForwardOutput = {}
        for group in grouped(passes).values():
            outputs.update(self._read(group))
        return {name: outputs[name] for name in passes}

    def _read(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        """Passes of one kind in one run through the layers."""
        rows = PackedInputs(list(passes.values()))
        features, branch = self.encode(rows)
        outputs: ForwardOutput = {}
        for index, (name, one) in enumerate(passes.items()):
            outputs[name] = {}
            for head in one.heads:
                found = rows.find(features, index, head)
                found_branch = rows.find(branch, index, head) if branch is not None and head == "itc" else None
                outputs[name].update(self.head_outputs(head, one, found, found_branch))
        return outputs

    @abstractmethod
    def encode(self, rows: PackedInputs) -> tuple[Tensor, Tensor | None]:
        """Return final features at `rows.output_positions` (B, K, D; None: everywhere) and those of a second branch."""

    @abstractmethod
    def head_outputs(self, head: Head, one: ForwardInput, features: Tensor, branch: Tensor | None) -> dict[str, Tensor]:
        """A head's outputs by name, from the features (B, K, D) at the positions it reads."""

    @abstractmethod
    def part_of(self, parameter: str) -> str:
        """The name in PARTS that a parameter belongs to; every parameter belongs to exactly one."""

    @abstractmethod
    def modules_for(self, objective: Objective, source_type: SourceType) -> frozenset[str] | None:
        """The parts whose parameters all get a gradient from an objective over sources of that use.

        None where the model has no such head, or the objective nothing to read.
        """

    def transformer_blocks(self) -> list[nn.Module]:
        """The blocks of all its transformers, in which nearly all work is done and nearly all activations arise."""
        return [module for module in self.modules() if isinstance(module, self.BLOCK)]

    def parts_used(self, objectives: Iterable[Objective], source_type: SourceType) -> frozenset[str]:
        """The parts that get a gradient in a stage. ConfigError if the model cannot serve an objective."""
        used: set[str] = set()
        for objective in objectives:
            parts = self.modules_for(objective, source_type)
            if parts is None:
                raise ConfigError(self._not_read(objective, source_type))
            used |= parts
        return frozenset(used)

    def _not_read(self, objective: Objective, source_type: SourceType) -> str:
        readable = [other for other in get_args(SourceType) if self.modules_for(objective, other) is not None]
        if not readable:
            return (
                f"objective '{objective}' is none that a model of kind '{self.config.kind}' learns; "
                "`mome objectives` lists what goes with what"
            )
        return (
            f"objective '{objective}' reads {' or '.join(readable)}, and no source of the stage gives that "
            f"(sources give: {source_type}); add a source or drop the objective"
        )

    def parts_named(self, names: Iterable[str]) -> frozenset[str]:
        """The parts that names of a config's `freeze` stand for; ConfigError for a name that stands for none."""
        found: set[str] = set()
        for name in names:
            parts = {part for part in self.PARTS if part == name or part.startswith(f"{name}.")}
            if not parts:
                known = sorted({*self.PARTS, *(part.split(".")[0] for part in self.PARTS)})
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"the parts are {', '.join(known)}"
                raise ConfigError(f"freeze: '{name}' is no part of the model; {hint}")
            found |= parts
        return frozenset(found)

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Weights of a model of section `before`, made to fit this one by the kind's published rule.

        Of a kind that has such a rule, `RESIZABLE` names the keys it serves; a difference in any other is refused.
        Raises ConfigError naming the keys with both values.
        """
        own, other = self.config.architecture(), before.architecture()
        different = [key for key in own | other if own.get(key) != other.get(key) and key not in self.RESIZABLE]
        if different:
            told = ", ".join(f"{key} {other.get(key)!r} there, {own.get(key)!r} here" for key in different)
            raise ConfigError(
                f"the weights are of another architecture ({told}); give the same `model` section, or other weights"
            )
        return dict(state)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set every parameter, each from the seed and its own name: another head or layer changes no other weight."""
        for name, parameter in self.named_parameters():
            self.initialize_parameter(name, parameter, seed)

    def initialize_parameter(self, name: str, parameter: Tensor, seed: int) -> None:
        """Truncated normal weights as BERT and BEiT; biases 0, norms 1, logit scales CLIP's."""
        last = name.rpartition(".")[2]
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif last.endswith("bias"):
            nn.init.zeros_(parameter)
        elif last.startswith("log_scale"):
            nn.init.constant_(parameter, math.log(INITIAL_SCALE))
        else:
            draw_normal(name, parameter, self.config.init_std, seed)


def draw_normal(name: str, parameter: Tensor, std: float, seed: int) -> None:
    """Normal numbers truncated at two deviations, a function of the seed and the parameter's name."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    drawn = torch.empty(parameter.shape)
    generator = torch.Generator().manual_seed(key)
    nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
    parameter.copy_(drawn)


def aligned(one: ForwardInput, features: Tensor, patches_keep: Tensor | None = None) -> dict[str, Tensor]:
    """The outputs of the `alignment` head, from the final features (B, L + I, D) of a fused pass."""
    assert one.text is not None
    length = one.text.shape[1]
    words, patches = features[:, :length], features[:, length + 1 :]
    keep = torch.ones_like(one.text, dtype=torch.bool) if one.text_keep is None else one.text_keep
    place = torch.arange(length, device=keep.device)
    inner = (place > 0) & (place < keep.sum(dim=1, keepdim=True) - 1)
    if patches_keep is None:
        patches_keep = torch.ones(patches.shape[:2], dtype=torch.bool, device=keep.device)
    return {"words": words, "patches": patches, "words_keep": inner, "patches_keep": patches_keep}
