"""The interface of every kind of model: named forward inputs in, named outputs out, parameters in named parts.

A subclass says which parts each objective trains and how packed inputs become features. Outputs of heads are float32,
whatever the parameters' precision.

Shapes: B examples, L tokens, I image tokens, K positions that a head reads or masked patches, V visible patches,
P patches, g x g grid, D width, E embedding width, W width of the image decoder.
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ImageDecoderConfig, ImageTarget, TransformerConfig
from pipeline.models import resize
from pipeline.models.forward import ForwardInput, ForwardOutput, Head, InputKind, PackedInputs
from pipeline.models.multiway import EPSILON, TEXT_EPSILON, MultiwayBlock, key_padding, named_layers, run_blocks

COLOUR_CLASSES = 512  # three bits per channel
MAX_SCALE = 100.0  # CLIP's bound
# The modules of heads that are not called after them.
_HEAD_MODULES = {"decoded_image": "mim_head", "classes": "classification_head", "answers": "vqa_head"}
_POOLED_HEADS = ("itm", "answers", "nlvr2", "ranking")


@dataclass(frozen=True)
class HeadConfig:
    """The heads that a stage needs beyond the model's section."""

    image_target: ImageTarget | None = None
    visual_tokens: int = 0  # vocabulary of the image tokenizer
    image_decoder: ImageDecoderConfig | None = None
    classes: int | None = None
    answers: int | None = None
    nlvr2: bool = False
    ranking: bool = False
    bounds_scales: bool = True  # clamp the logit scales; commented out in VLMo's release


class ContrastiveHead(nn.Module):
    """Projections of each modality's [CLS] (VLMo: and its vision-language expert's) into one space, with a scale."""

    def __init__(
        self,
        width: int,
        contrasts: Literal[1, 2] = 2,
        embedding: int | None = None,
        max_scale: float = MAX_SCALE,
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        self.max_scale = max_scale
        self.suffixes = ("", "_vl")[:contrasts]
        for suffix in self.suffixes:
            for name, features in (("image", width), ("text", text_width or width)):
                self.add_module(f"{name}{suffix}", nn.Linear(features, embedding or width, bias=False))
            # One element, not 0-d: DeepSpeed broadcasts parameters as bytes, which 0-d tensors cannot be viewed as.
            self.register_parameter(f"log_scale{suffix}", nn.Parameter(torch.tensor([math.log(1 / 0.07)])))

    def forward(self, modality: Literal["image", "text"], *cls: Tensor) -> dict[str, Tensor]:
        """Return `itc`, `itc_vl`, unit vectors (B, E), and `scale`, `scale_vl` (0-d), from one [CLS] (B, D) each."""
        outputs = {}
        for suffix, features in zip(self.suffixes, cls, strict=True):
            projected = self.get_submodule(f"{modality}{suffix}")(features)
            log_scale = self.get_parameter(f"log_scale{suffix}")
            outputs[f"itc{suffix}"] = F.normalize(projected.float(), dim=-1)
            outputs[f"scale{suffix}"] = log_scale.float().exp().clamp(max=self.max_scale).squeeze(0)
        return outputs


class ImageDecoder(nn.Module):
    """MAE's decoder (arXiv 2111.06377, section 3): predicts the patches that the encoder never read.

    A light transformer reads the encoder's features of the visible patches, and for each masked one an embedding with
    its position. Positions are fixed, so that weights serve any grid: zeros for [CLS]; then, for each patch, the first
    half encodes the column and the second the row, as sines, then cosines.
    """

    positions: Tensor

    def __init__(self, width: int, grid: int, targets: int, config: ImageDecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(width, config.width)
        self.mask = nn.Parameter(torch.empty(config.width))
        frequency = torch.exp(-math.log(10_000.0) * torch.arange(config.width // 4) / (config.width // 4))
        angle = torch.arange(grid)[:, None] * frequency
        axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (g, W / 2)
        places = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
        self.register_buffer("positions", F.pad(places, (0, 0, 1, 0)), persistent=False)  # (1 + P, W)
        self.blocks = nn.ModuleList(
            MultiwayBlock(config.width, config.heads, 4, ("vision",), None, 0.0, key_bias=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)
        self.predict = nn.Linear(config.width, targets)

    def forward(self, features: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return predictions (B, K, targets) for the patches `masked` (B, K).

        `features` (B, 1 + V, D) are those of [CLS] and of the patches `visible` (B, V), padding where that is negative.
        """
        encoded = self.embed(features)
        positions = self.positions.to(encoded.dtype)
        known = encoded + F.embedding(F.pad(visible.clamp(min=0) + 1, (1, 0)), positions)
        x = torch.cat([known, self.mask + F.embedding(masked + 1, positions)], dim=1)
        padding = key_padding(F.pad(visible >= 0, (1, masked.shape[1]), value=True), x.dtype)
        outputs = torch.arange(known.shape[1], x.shape[1], device=x.device).expand(len(x), -1)
        return self.predict(self.norm(run_blocks(self.blocks, x, "vision", padding, None, outputs))).float()


class Model(nn.Module, ABC):
    # A name in `freeze` also selects the parts that begin with it and a dot: "vision_expert" freezes both halves.
    PARTS: ClassVar[tuple[str, ...]]
    HEAD_PARTS: ClassVar[tuple[str, ...]]  # may be initialized at random when weights are loaded into a stage
    PART_OF: ClassVar[dict[str, str]] = {  # of parameters or modules that their outermost module does not name
        "image_embedding.mask": "mim_head",  # heads need these two, and the encoder reads them
        "image_embedding.second": "nlvr2_head",
    }
    ENCODER_PARTS: ClassVar[dict[frozenset[InputKind], frozenset[str]]]  # by the inputs of a forward
    HEADS: ClassVar[tuple[Head, ...]]  # besides "tokens", which trains nothing
    RESIZABLE: ClassVar[frozenset[str]] = frozenset()  # keys of the section that `resize_state` can change
    READS_LAST_TOKEN: ClassVar[bool] = False  # heads of one position read a text's last token instead of its first
    GRID_RULE: ClassVar[resize.GridRule] = "bilinear"  # of absolute positions of patches at another image size
    BLOCK: ClassVar[type[nn.Module]] = MultiwayBlock  # of its transformers: nearly all computation and activations

    text_embedding: nn.Module
    image_embedding: nn.Module

    def __init__(self, config: TransformerConfig, heads: HeadConfig) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        self.part_of_module = dict(self.PART_OF)
        self.branch_parts = frozenset[str]()  # that only the second branch of `encode` reads

    def build_heads(self, vocabulary: int = 0, text_epsilon: float = TEXT_EPSILON, **own: nn.Module) -> None:
        """Build the modules of HEAD_PARTS, in that order; those in `own` are the model's, None those a stage lacks."""
        heads, width = self.heads, self.config.width
        for part in self.HEAD_PARTS:
            module: nn.Module | None = own.get(part)
            if module is not None:
                pass
            elif part == "pooler":  # BERT's
                module = named_layers(dense=nn.Linear(width, width), tanh=nn.Tanh())
            elif part == "itm_head":
                module = named_layers(classify=nn.Linear(width, 2))  # (not matched, matched)
            elif part == "mlm_head":  # BERT's transform, and a decoder with weights of its own
                dense, norm = nn.Linear(width, width), nn.LayerNorm(width, eps=text_epsilon)
                module = named_layers(dense=dense, gelu=nn.GELU(), norm=norm, decode=nn.Linear(width, vocabulary))
            elif part == "mim_head" and heads.image_target is not None:
                pixels = 3 * self.config.patch_size**2
                sizes = {"mean_colour": COLOUR_CLASSES, "pixels": pixels, "visual_tokens": heads.visual_tokens}
                targets = sizes[heads.image_target]
                if heads.image_decoder is not None:
                    module = ImageDecoder(width, self.config.grid, targets, heads.image_decoder)
                else:
                    module = named_layers(predict=nn.Linear(width, targets))
            elif part == "classification_head" and heads.classes:
                module = named_layers(classify=nn.Linear(width, heads.classes))
            elif (part == "vqa_head" and heads.answers) or (part == "nlvr2_head" and heads.nlvr2):
                # NLVR2's reads the pooled features of both images.
                inputs, outputs = (width, heads.answers or 0) if part == "vqa_head" else (2 * width, 2)
                expand, classify = nn.Linear(inputs, 2 * width), nn.Linear(2 * width, outputs)
                module = named_layers(expand=expand, norm=nn.LayerNorm(2 * width), gelu=nn.GELU(), classify=classify)
            elif part == "ranking_head" and heads.ranking:
                module = named_layers(score=nn.Linear(width, 1), flatten=nn.Flatten(0))
            self.register_module(part, module)

    def forward(self, inputs: dict[str, ForwardInput]) -> ForwardOutput:
        """Run all inputs and return each one's head outputs under its name; `ForwardInput` lists them.

        Inputs share a run if they have the same modalities, image shape and branching, and drop path in all or none.
        """
        groups: dict[tuple, dict[str, ForwardInput]] = {}
        for name, own in inputs.items():
            image = None
            if own.image is not None:  # images with a size are padded to one shape
                shape = None if own.image_size is not None else own.image.shape[1:]
                image = (shape, own.image.dtype, own.visible_patches is None)
            absent = (member is None for member in (own.regions, own.text, own.drop_path_mask))
            groups.setdefault((image, *absent, "itc" in own.heads), {})[name] = own
        outputs: ForwardOutput = {name: {} for name in inputs}
        for group in groups.values():
            packed = PackedInputs(list(group.values()), self.READS_LAST_TOKEN)
            length, most = 0 if packed.text is None else packed.text.shape[1], self.config.max_text_length
            if length > most:
                raise ValueError(
                    f"a text of {length} tokens is longer than the model's {most} positions; shorten the text or raise "
                    "model.max_text_length"
                )
            features, branch = self.encode(packed)
            for index, (name, forward_input) in enumerate(group.items()):
                for head in forward_input.heads:
                    read = [packed.select(x, index, head) for x in (features, branch) if x is not None]
                    outputs[name] |= self.head_outputs(head, forward_input, *read)
        return outputs

    @abstractmethod
    def encode(self, packed: PackedInputs) -> tuple[Tensor, Tensor | None]:
        """Return final features (B, K, D) at `packed.output_positions` (None: everywhere), and a second branch's."""

    def embed(self, packed: PackedInputs) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, L, D) of the text followed by the image, or of one alone, and which are real (B, L)."""
        tokens = []
        if packed.text is not None and packed.text_keep is not None:
            tokens.append((self.text_embedding(packed.text), packed.text_keep))
        if packed.image is not None:
            tokens.append(self.image_embedding(packed))
        x, keep = (torch.cat(parts, dim=1) for parts in zip(*tokens, strict=True))
        return x, keep

    def head_outputs(self, head: Head, inputs: ForwardInput, features: Tensor, *branch: Tensor) -> dict[str, Tensor]:
        """Return a head's outputs by name, from the features (B, K, D) at the positions it reads, in float32."""
        if head == "tokens":
            return {head: features}
        if head == "alignment" and head in self.HEADS:
            return alignment_outputs(inputs, features, self.config.patch_size)
        module = getattr(self, _HEAD_MODULES.get(head, f"{head}_head"), None)
        is_decoded = self.heads.image_decoder is not None
        if module is None or (head in ("mim", "decoded_image") and is_decoded != (head == "decoded_image")):
            raise ValueError(f"this {self.config.kind} model was built without the head '{head}'")
        if head == "itc":
            modality: Literal["image", "text"] = "image" if inputs.text is None else "text"
            return module(modality, *(x[:, 0] for x in (features, *branch)))
        if head == "decoded_image":
            return {"mim": module(features, inputs.visible_patches, inputs.patch_positions)}
        if head in ("classes", "itm", "answers", "ranking"):
            features = features[:, 0]
        if head in _POOLED_HEADS:  # NLVR2's reads the [CLS] of both images
            features = getattr(self, "pooler", nn.Identity())(features).flatten(1)
        return {head: module(features).float()}

    def part_of(self, parameter: str) -> str:
        """Return the name in PARTS that a parameter belongs to, by the entry of it or its innermost module."""
        module = parameter
        while "." in module and module not in self.part_of_module:
            module = module.rpartition(".")[0]
        part = self.part_of_module.get(module, module)
        assert part in self.PARTS, f"{parameter} belongs to no part"
        return part

    def modules_for(self, inputs: frozenset[InputKind], head: Head) -> frozenset[str] | None:
        """Return the parts that get a gradient from a head of a forward over these inputs; None if unsupported."""
        encoder = self.ENCODER_PARTS.get(inputs)
        if encoder is None or head not in self.HEADS:
            return None
        encoder |= self.branch_parts if head == "itc" else frozenset()
        with_parameters = {self.part_of(name) for name, _ in self.named_parameters()}
        parts = {_HEAD_MODULES.get(head, f"{head}_head"), *(["pooler"] if head in _POOLED_HEADS else [])}
        return (encoder & with_parameters) | parts.intersection(self.PARTS)

    def parts_named(self, names: Iterable[str]) -> frozenset[str]:
        """Return the parts selected by the names in a config's `freeze`. Raises ConfigError for an unknown name."""
        selected: set[str] = set()
        for name in names:
            if not (parts := {part for part in self.PARTS if part == name or part.startswith(f"{name}.")}):
                known = sorted({*self.PARTS, *(part.split(".")[0] for part in self.PARTS)})
                matches = get_close_matches(name, known, n=1)
                hint = f"did you mean '{matches[0]}'?" if matches else f"the parts are {', '.join(known)}"
                raise ConfigError(f"freeze: the model has no part '{name}'; {hint}")
            selected |= parts
        return frozenset(selected)

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Fit weights of a model with section `before` to this one, by the published rules of its kind (see `resize`).

        The second image's modality vector (NLVR2) starts as a copy of the first's. Raises ConfigError naming the keys
        that differ and are not in `RESIZABLE`, with both values.
        """
        own, other = self.config.architecture(), before.architecture()
        if different := [key for key in own | other if own.get(key) != other.get(key) and key not in self.RESIZABLE]:
            values = ", ".join(f"{key} {other.get(key)!r} there, {own.get(key)!r} here" for key in different)
            raise ConfigError(
                f"the weights are of another architecture ({values}); give the same `model` section, or other weights"
            )
        grid, length, resized = self.config.grid, self.config.max_text_length, dict(state)
        for name, tensor in state.items():
            if name == "positions.image":
                resized[name] = resize.resize_relative_grid(tensor, grid)
            elif name == "positions.text":
                resized[name] = resize.resize_text_distances(tensor, length)
            elif name == "image_embedding.positions":
                resized[name] = resize.resize_grid(tensor, grid, self.GRID_RULE)
            elif name == "text_embedding.positions":
                resized[name] = resize.cut_text_positions(tensor, length)
        if self.heads.nlvr2 and "image_embedding.modality" in resized:
            resized.setdefault("image_embedding.second", resized["image_embedding.modality"].clone())
        return resized

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw normal weights truncated at two deviations, as BERT and BEiT do; biases 0, norms 1.

        Logit scales, LayerScale gammas and relative positions keep the values they were built with. Each draw depends
        on the seed and the parameter's name, so that another head or layer changes no other.
        """
        std = self.config.weight_std
        for name, parameter in self.named_parameters():
            last = name.rpartition(".")[2]
            if re.search(r"(norm|LayerNorm)(\.(vision|language))?\.weight$", name):
                nn.init.ones_(parameter)
            elif last.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not last.startswith("log_scale") and not last.endswith("gamma") and not name.startswith("positions."):
                key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
                values, generator = torch.empty(parameter.shape), torch.Generator().manual_seed(key)
                parameter.copy_(nn.init.trunc_normal_(values, 0.0, std, -2 * std, 2 * std, generator))


def alignment_outputs(inputs: ForwardInput, features: Tensor, patch_size: int) -> dict[str, Tensor]:
    """Return the outputs of the `alignment` head from the final features (B, L + I, D) of a fused input."""
    assert inputs.text is not None
    length, device = inputs.text.shape[1], features.device
    words, patches = features[:, :length], features[:, length + 1 :]
    keep = torch.ones_like(inputs.text, dtype=torch.bool) if inputs.text_keep is None else inputs.text_keep
    position = torch.arange(length, device=device)
    is_word = (position > 0) & (position < keep.sum(dim=1, keepdim=True) - 1)
    if inputs.visible_patches is not None:
        is_patch = inputs.visible_patches >= 0
        is_patch = F.pad(is_patch, (0, patches.shape[1] - is_patch.shape[1]))
    else:  # real patches come first
        assert inputs.image is not None
        height, width = inputs.image.shape[1:3]
        pixels = height * width if inputs.image_size is None else inputs.image_size.prod(dim=1, keepdim=True)
        is_patch = torch.arange(patches.shape[1], device=device).expand(len(patches), -1) < pixels // patch_size**2
    return {"words": words, "patches": patches, "words_keep": is_word, "patches_keep": is_patch}
