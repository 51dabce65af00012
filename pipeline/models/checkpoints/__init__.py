"""Published checkpoint formats, one converter each, and the names that `mome import` and `mome export` know them by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ImageTarget
from pipeline.models.checkpoints import beit, bert, vilt, vit, vlmo
from pipeline.models.checkpoints.conversion import ConfigFile

State = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """A published naming of weights, with exact conversions in both directions."""

    # A published state and keys given by the user -> the `model` section, as plain values; ConfigError where unknown.
    infer: Callable[[State, Mapping[str, Any]], dict[str, Any]]
    # A published state, the section, and patterns of names that may differ -> ours; CheckpointError lists all faults.
    read: Callable[[State, Any, Collection[str]], State]
    # Ours and the section -> a published state, without what the format has no names for.
    write: Callable[[State, Any], State]
    kinds: tuple[str, ...] | None = None  # of model that the format can hold; None: every
    exact: bool = True  # False: a round trip computes the same, with other tensors
    config: ConfigFile | None = None  # of a Hugging Face folder: how its config.json is read
    image_target: ImageTarget | None = None  # of its masked-image head; None: inferred from the number of outputs


def _section_as_given(state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
    if not overrides:
        raise ConfigError("plain tensors do not identify their model; give a config with --model")
    return dict(overrides)


def _unchanged(state: State, section: Any, allowed: Collection[str] = ()) -> State:
    return dict(state)


FORMATS: dict[str, Format] = {
    "vlmo": Format(vlmo.infer_section, vlmo.from_published, vlmo.to_published, ("vlmo",)),
    "vilt": Format(vilt.infer_section, vilt.from_published, vilt.to_published, ("vilt",)),
    "vilt-hf": Format(
        vilt.infer_hugging_face_section, vilt.from_hugging_face, vilt.to_hugging_face, ("vilt",), config=vilt.CONFIG
    ),
    "vit": Format(vit.infer_section, vit.from_hugging_face, vit.to_hugging_face, ("vit",), config=vit.CONFIG),
    "beit": Format(
        beit.infer_section,
        beit.from_published,
        beit.to_published,
        ("vlmo",),
        exact=False,
        config=beit.CONFIG,
        image_target="visual_tokens",
    ),
    "bert": Format(
        bert.infer_section, bert.from_hugging_face, bert.to_hugging_face, ("imagebert",), config=bert.CONFIG
    ),
    "safetensors": Format(_section_as_given, _unchanged, _unchanged),  # our own names
}


def format_named(name: str) -> Format:
    """Return the format of a name. Raises ConfigError listing the known ones."""
    if name not in FORMATS:
        raise ConfigError(f"--format {name}: unknown; known: {', '.join(FORMATS)}")
    return FORMATS[name]
