"""`mome import` and `mome export`: weights to and from published formats.

What is imported becomes a folder like a finished stage's, which `start_from`, `mome evaluate` and `mome export` read.
Its config names the objectives whose heads the file brought, over a source that does not exist: `mome evaluate` is
given one with `--source`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.load import apply_override, load_config, validate
from pipeline.config.model import TransformerConfig
from pipeline.config.schema import DataConfig, Objective, RunConfig, StageConfig, Use
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage, join
from pipeline.models import skeleton
from pipeline.models.checkpoints import Format, format_named
from pipeline.models.checkpoints.files import Published, read_tensors, write_tensors
from pipeline.models.model import COLOUR_CLASSES, Heads, ImageTarget, Model
from pipeline.training.checkpoint import is_committed, load_weights, save_weights
from pipeline.training.stages import check_fit

NO_SOURCE = "none"
MODEL_KEY = "model"  # of a safetensors header that we write: the model's section as JSON
# A stage for each use that the heads serve, the last of these being the one the weights are told to be of.
USES: tuple[Use, ...] = ("images", "text", "labelled", "regions", "pairs", "questions", "statements")
MAX_TEXT = StageConfig.model_fields["max_text"].default
WEIGHTS_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # Hugging Face's


def import_weights(
    path: str,
    format_name: str,
    out: str,
    overrides: Iterable[str] = (),
    model: Path | None = None,
    vocabulary: str | None = None,
    may_differ: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Write the weights of a published file where `start_from` reads them; returns what they are.

    Sizes come from the tensors' shapes, the section of the config `model`, and `overrides` (`heads=16`), the latter
    going first. `may_differ` are names or patterns of the file's tensors that may be missing, unexpected or of another
    shape. Raises ConfigError for a wrong request, CheckpointError for a file that does not fit.
    """
    storage, chosen = Storage(), format_named(format_name)
    if is_committed(storage, out):
        raise ConfigError(f"--out {out}: holds weights already; name another folder, or delete it first")
    published = _read(storage, path)
    section = _section(published, chosen, model, overrides)
    if chosen.kinds is not None and section.kind not in chosen.kinds:
        raise ConfigError(f"--format {format_name} holds models of kind {', '.join(chosen.kinds)}, not {section.kind}")
    # Copies, because a file may hold one memory under two names (tied embeddings), and ours may not.
    state = {name: t.clone() for name, t in chosen.read(published.tensors, section, may_differ).items()}
    words, heads = _num_words(section, state), _heads(state, section.patch_size)
    tokens = _tokens(storage, vocabulary, words)
    whole = skeleton(section, max(words, 1), heads)
    absent = {whole.part_of(name) for name in whole.state_dict() if name not in state} - set(whole.HEAD_PARTS)
    check_fit(whole, state, f"{path}: the model", frozenset(absent))
    config = _config(out, section.model_dump(mode="json"), _stages(section, heads, whole, state))
    stage = config.stages[-1].name
    metadata = {
        "config": config.model_dump(mode="json"),
        "stage": stage,
        "step": 0,
        "absent": sorted(absent),
        "imported": {"from": path, "format": format_name},
    }
    save_weights(storage, out, state, tokens, metadata)
    return {
        "checkpoint": out,
        "model": section.model_dump(mode="json"),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "absent": sorted(absent),
        "objectives": [objective for each in config.stages for objective in each.objectives],
    }


def export_weights(checkpoint: str, format_name: str, out: str) -> dict[str, Any]:
    """Write a stage's weights in a published format, and read them back to see that they are the same.

    Raises CheckpointError for a checkpoint that is none, ConfigError for a format that cannot hold its model.
    """
    storage, chosen = Storage(), format_named(format_name)
    weights = load_weights(storage, checkpoint.rstrip("/"))
    section = weights.config.model
    if chosen.kinds is not None and section.kind not in chosen.kinds:
        raise ConfigError(f"--format {format_name} holds models of kind {', '.join(chosen.kinds)}, not {section.kind}")
    published = chosen.write(weights.tensors, section)
    data = write_tensors(published, out, {"format": "pt", MODEL_KEY: section.model_dump_json()})
    back = chosen.read(read_tensors(data, out).tensors, section, ())
    left_out = weights.tensors.keys() - back.keys()
    changed = [n for n in back if chosen.exact and not torch.equal(back[n], weights.tensors[n])]
    assert not changed, f"format {format_name} changes {', '.join(changed)}"
    storage.write(out, data)
    return {
        "path": out,
        "format": format_name,
        "tensors": len(published),
        "bytes": len(data),
        "left_out": sorted(left_out),  # what the format has no names for
    }


def _read(storage: Storage, path: str) -> Published:
    inside = (join(path, name) for name in WEIGHTS_IN_FOLDER)
    file = path if storage.exists(path) else next((each for each in inside if storage.exists(each)), None)
    if file is None:
        raise CheckpointError(
            f"{path}: no such file, and no folder with {' or '.join(WEIGHTS_IN_FOLDER)}; give a published checkpoint"
        )
    return read_tensors(storage.read(file), file)


def _section(published: Published, chosen: Format, model: Path | None, overrides: Iterable[str]) -> TransformerConfig:
    given: dict[str, Any] = json.loads(published.metadata.get(MODEL_KEY, "{}"))
    if model is not None:
        given = load_config(model).model.model_dump(mode="json")
    for override in overrides:
        apply_override(given, override)
    section = chosen.infer(published.tensors, given)
    return _config("imported", section, [_stage("images", ["masked_image"])]).model


def _config(out: str, section: dict[str, Any], stages: list[dict[str, Any]]) -> RunConfig:
    """The config that imported weights are told to come from. Its folder is `out`, if that can be a run's name."""
    output, _, name = out.rstrip("/").rpartition("/")
    values = {
        "name": name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) else "imported",
        "output": output or ".",
        "model": section,
        "sources": {use: {"shards": NO_SOURCE, "use": use} for use in USES},
        "stages": stages,
    }
    return validate(values, "imported weights")


def _stage(use: Use, objectives: list[Objective], heads: Heads = Heads(), max_text: int = 1) -> dict[str, Any]:
    negatives = "hard" if "contrastive" in objectives else "random"
    target = {} if heads.image_target is None else {"image_target": heads.image_target}
    return {
        "name": f"imported_{use}",
        "sources": {use: 1.0},
        "objectives": {objective: {} for objective in objectives},
        "steps": 1,
        "batch": DataConfig().lanes,
        "max_text": max_text,
        "negatives": negatives,
        "classes": heads.classes,
        "answers": heads.answers,
        **target,
    }


def _stages(section: TransformerConfig, heads: Heads, model: Model, state: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A stage for every use of data that a head of the weights serves."""
    present = {model.part_of(name) for name in state}
    max_text = min(section.max_text, MAX_TEXT)

    def serves(objective: Objective, use: Use) -> bool:
        needed = (model.reads(objective, use) or frozenset()) & set(model.HEAD_PARTS)
        return bool(needed) and needed <= present

    objectives = {use: [each for each in get_args(Objective) if serves(each, use)] for use in USES}
    found = [_stage(use, each, heads, max_text) for use, each in objectives.items() if each]
    return found or [_stage("images", ["masked_image"], heads, max_text)]


def _heads(state: dict[str, Tensor], patch_size: int) -> Heads:
    """The heads that weights of ours carry, as a stage would have asked for them."""
    targets = _rows(state, "masked_image_head.predict.bias")
    known: dict[int, ImageTarget] = {COLOUR_CLASSES: "mean_colour", 3 * patch_size**2: "pixels"}
    return Heads(
        image_target=known.get(targets),
        classes=_rows(state, "classification_head.classify.bias") or None,
        answers=_rows(state, "answering_head.classify.bias") or None,
        reasoning=any(name.startswith("reasoning_head.") for name in state),
        ranking=any(name.startswith("ranking_head.") for name in state),
    )


def _rows(state: dict[str, Tensor], name: str) -> int:
    return len(state[name]) if name in state else 0


def _num_words(section: TransformerConfig, state: dict[str, Tensor]) -> int:
    """The vocabulary of the weights: the rows of whatever grows with it. 0 for a model that reads no text."""
    few, more = (dict(skeleton(section, vocabulary).named_parameters()) for vocabulary in (1, 2))
    return next((len(state[name]) for name in few if few[name].shape != more[name].shape and name in state), 0)


def _tokens(storage: Storage, vocabulary: str | None, words: int) -> list[str]:
    """The vocabulary file's tokens, one for each row of the weights' word embedding."""
    if not words:
        return []
    if vocabulary is None:
        raise ConfigError(
            f"the weights know {words} tokens, but not which; name the vocabulary file they were trained with, one "
            "token a line, with --vocabulary (published models: bert-base-uncased's vocab.txt)"
        )
    tokens = list(Tokenizer.load(storage, vocabulary).tokens)
    if len(tokens) != words:
        raise ConfigError(f"--vocabulary {vocabulary}: has {len(tokens)} tokens, the weights have {words}")
    return tokens
