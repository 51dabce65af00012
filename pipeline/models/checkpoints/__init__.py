"""Published checkpoint formats, one converter each, and the names that `mome import` and `mome export` know them by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.models.checkpoints.beit import BEiTFormat
from pipeline.models.checkpoints.bert import BERTFormat
from pipeline.models.checkpoints.conversion import Format, State
from pipeline.models.checkpoints.vilt import ViLTFormat, ViLTHuggingFaceFormat
from pipeline.models.checkpoints.vit import ViTFormat
from pipeline.models.checkpoints.vlmo import VLMoFormat


class PlainFormat(Format):
    """Our own names, of every kind of model."""

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        if not overrides:
            raise ConfigError("plain tensors do not identify their model; give a config with --model")
        return dict(overrides)

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        return dict(state)

    def write(self, state: State, config: Any) -> State:
        return dict(state)


FORMATS: dict[str, Format] = {
    "vlmo": VLMoFormat(),
    "vilt": ViLTFormat(),
    "vilt-hf": ViLTHuggingFaceFormat(),
    "vit": ViTFormat(),
    "beit": BEiTFormat(),
    "bert": BERTFormat(),
    "safetensors": PlainFormat(),
}


def format_named(name: str) -> Format:
    """Return the format of a name. Raises ConfigError listing the known ones."""
    if name not in FORMATS:
        raise ConfigError(f"--format {name}: unknown; known: {', '.join(FORMATS)}")
    return FORMATS[name]
