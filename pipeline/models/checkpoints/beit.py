"""BEiT checkpoints as VLMo's vision stage, and back: Hugging Face's names, and those of BEiT's own release.

A BEiT provides the image embedding, attention, the vision expert and its part of the relative table, and with a head
for visual tokens that head too. Everything else of a VLMo is absent: language, the other experts, other heads.
Pretraining checkpoints have one relative table for all layers, fine-tuned ones a table for each, as VLMo does. VLMo's
image modality vector starts as zeros, and is exported by adding it to the tensors it is added to.

Position indices are dropped, as is the classifier, which reads the mean of all patches. Three names exist for the final
norm. The pooler's, in models with a classifier, was trained for that mean as well, and is the closest that they have.

Shapes: R rows of a table, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from pipeline.models.checkpoints import conversion
from pipeline.models.checkpoints.conversion import MASK, Format, State

_LAYERS = "beit.encoder.layer."
# The final norm's names in a BeitModel without a pooler, in BeitForMaskedImageModeling, and in a BeitModel with one.
NORMS = ("beit.layernorm", "layernorm", "beit.pooler.layernorm")
SHARED_TABLE = "beit.encoder.relative_position_bias.relative_position_bias_table"
LAYER_TABLE = _LAYERS + "{}.attention.attention.relative_position_bias.relative_position_bias_table"
_MODALITY = "image_embedding.modality"
# The tensors to which the modality vector is added, each of which begins an image token.
_CARRIES_MODALITY = ("image_embedding.cls", "image_embedding.patch.bias", MASK)

# BEiT's release (microsoft/unilm, beit) on the left; `attn.qkv.weight` is also split in three.
_RELEASE = (
    (r"^(cls_token|mask_token)$", r"beit.embeddings.\1"),
    (r"^pos_embed$", "beit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "beit.embeddings.patch_embeddings.projection."),
    (r"^rel_pos_bias\.relative_position", "beit.encoder.relative_position_bias.relative_position"),
    (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", "beit.pooler.layernorm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.", _LAYERS),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attn\.v_bias$", ".attention.attention.value.bias"),
    (r"\.attn\.relative_position", ".attention.attention.relative_position_bias.relative_position"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


class BEiTFormat(Format):
    title: ClassVar = "BEiT"
    kinds: ClassVar = ("vlmo",)
    exact: ClassVar = False
    config: ClassVar = conversion.ConfigFile(
        "beit",
        keys={"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"},
        computed={"hidden_act": ("gelu",), "num_channels": (3,)},
        sizes=conversion.SIZES | conversion.IMAGE_SIZES,
    )
    image_target: ClassVar = "visual_tokens"
    prefix: ClassVar = "beit."
    outside: ClassVar = conversion.hugging_face_image_names("beit.embeddings") | {
        "norm": NORMS[0],
        "mim_head.predict": "lm_head",
    }
    layers: ClassVar = _LAYERS
    optional: ClassVar = ("mim_head",)
    unused: ClassVar = r"relative_position_index$|^classifier\."
    tables: ClassVar = (SHARED_TABLE, LAYER_TABLE.format(0))

    def infer_more(self, state: State, section: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sizes that tables of positions show, and VLMo's number of vision-language layers."""
        layers = section["layers"]
        upper = 3 if layers > 12 else min(2, layers - 1)  # VLMo's, of base and of large
        reason = f"VLMo's, for {layers} layers"
        more = {"vision_language_layers": conversion.assumed("vision_language_layers", upper, reason, overrides)}
        if (table := next((state[name] for name in self.tables if name in state), None)) is not None:
            grid = (round((len(table) - 3) ** 0.5) + 1) // 2
            more |= {"heads": table.shape[1], "image_size": grid * section["patch_size"]}
        return more

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        """Convert to the vision stage's state; errors have Hugging Face's names."""
        state = {name: tensor for name, tensor in self.prepare(state).items() if not re.search(self.unused, name)}
        names: list[str] = []  # of the relative tables (R, H), in layer order
        if config.positions == "relative":
            names = [SHARED_TABLE]
            if SHARED_TABLE not in state:
                names = [LAYER_TABLE.format(layer) for layer in range(config.layers)]
        tables = dict.fromkeys(names, ((2 * config.grid - 1) ** 2 + 3, config.heads))
        converted = conversion.from_named(state, *self.layout(config, state), allowed, tables)
        if tables and all(name in state for name in tables):
            layers = [state[name] for name in tables]
            joined = torch.cat(layers, dim=1) if len(layers) > 1 else layers[0].repeat(1, config.layers)
            converted["positions.image"] = joined
        return converted | {_MODALITY: torch.zeros(config.width)}

    def write(self, state: State, config: Any) -> State:
        """Convert the vision part to a BEiT that computes the same from images.

        A state that predicts visual tokens becomes a pretraining checkpoint, any other a BeitModel. Equal relative
        tables are written as one, which Hugging Face's class for pretraining reads
        (`use_shared_relative_position_bias`). Tables of zeros say nothing about sharing; a BeitModel then has one per
        layer.
        """
        if (modality := state.get(_MODALITY)) is not None:  # BEiT has none: fold it into the tensors it is added to
            state = {name: t + modality if name in _CARRIES_MODALITY else t for name, t in state.items()}
        published = super().write(state, config)
        is_pretrained = "mim_head.predict.bias" in state
        if is_pretrained:
            for last in ("weight", "bias"):
                published[f"{NORMS[1]}.{last}"] = published.pop(f"{NORMS[0]}.{last}")
        if config.positions == "relative":
            tables = state["positions.image"].chunk(config.layers, dim=1)
            is_shared = all(torch.equal(table, tables[0]) for table in tables)
            if is_shared and (is_pretrained or tables[0].any()):
                published[SHARED_TABLE] = tables[0].clone()
            else:
                published |= {LAYER_TABLE.format(layer): table.clone() for layer, table in enumerate(tables)}
        return published

    def prepare(self, state: State) -> State:
        """Return Hugging Face's names with the prefix `beit.` and one for the final norm, from the release's too."""
        if "patch_embed.proj.weight" in state:
            renamed: State = {}
            for name, tensor in state.items():
                if joint := re.match(r"^blocks\.(\d+)\.attn\.qkv\.weight$", name):
                    parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
                    renamed |= {f"{_LAYERS}{joint[1]}.attention.attention.{part}.weight": rows for part, rows in parts}
                    continue
                for pattern, replacement in _RELEASE:
                    name = re.sub(pattern, replacement, name)
                renamed[name] = tensor
            state = renamed
        else:
            state = super().prepare(state)
        norm = next((name for name in NORMS if f"{name}.weight" in state), NORMS[0])
        return {re.sub(rf"^{re.escape(norm)}\.", f"{NORMS[0]}.", name): tensor for name, tensor in state.items()}

    def names(self, parameter: str) -> tuple[str, ...]:
        return () if parameter == _MODALITY else super().names(parameter)
