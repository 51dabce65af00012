"""`mome import` and `mome export`: convert weights from and to published formats.

Imported weights become a folder like a finished stage's, which `start_from`, `mome evaluate` and `mome export` read.
Its config names the objectives whose heads the file contains, with a source that does not exist: `mome evaluate` needs
`--source`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from jobs.published import choices_of_published, read_published, vocabulary_of
from pipeline.config.errors import CheckpointError, ConfigError, MomeError
from pipeline.config.load import apply_override, load_config, validate
from pipeline.config.schema import DataConfig, RunConfig, SourceType, StageConfig, TransformerConfig, objective_names
from pipeline.data.contents.text import Tokenizer, is_cased
from pipeline.data.storage import Storage
from pipeline.models import skeleton
from pipeline.models.checkpoints import Format, format_named
from pipeline.models.checkpoints.files import Published, read_json, read_tensors, write_tensors
from pipeline.models.model import COLOUR_CLASSES, HeadConfig, ImageTarget, Model
from pipeline.objectives import head_config, modules_for
from pipeline.training.checkpoint import Weights, is_committed, is_file_of_weights, load_weights, save_weights
from pipeline.training.stages import check_fit

NO_SOURCE = "none"
# Metadata keys of the files we write (JSON values): the model section and the target of the masked-image head. Further
# keys hold the answers and classes of other heads.
MODEL_KEY, IMAGE_TARGET_KEY = "model", "image_target"
# One stage per source type that the heads support; the weights belong to the last one.
USES: tuple[SourceType, ...] = ("images", "text", "labelled", "regions", "pairs", "questions", "statements")
MAX_TEXT = StageConfig.model_fields["max_text_length"].default


def import_weights(
    path: str,
    format_name: str,
    out: str,
    overrides: Iterable[str] = (),
    model: Path | None = None,
    vocabulary: str | None = None,
    may_differ: tuple[str, ...] = (),
    answers: str | None = None,
) -> dict[str, Any]:
    """Write the weights of a published file or folder where `start_from` reads them; return their description.

    Sizes come from `overrides` (`heads=16`), else the model section of the config `model`, else the file's own header
    if we wrote it, else the config.json next to the weights, else the tensors' shapes. `may_differ` holds names or
    patterns of tensors that may be missing, unexpected or of another shape. `answers` lists the answers of a VQA head.
    Raises ConfigError for an invalid request, CheckpointError for a file that does not fit.
    """
    storage, chosen = Storage(), format_named(format_name)
    if is_committed(storage, out):
        raise ConfigError(f"--out {out}: holds weights already; name another folder, or delete it first")
    if existing := [name for name in storage.list(out) if is_file_of_weights(name)]:
        raise ConfigError(
            f"--out {out}: holds {existing[0]}, which would be lost; name another folder, or delete it first"
        )
    published, folder = read_published(storage, path, hugging_face=chosen.config is not None)
    with _damage_named(path, format_name):
        section = _section(published, chosen, model, overrides)
        # Copies, because a file may hold one memory under two names (tied embeddings), and ours may not.
        state = {name: t.clone() for name, t in chosen.read(published.tensors, section, may_differ).items()}
        image_target = chosen.image_target
        if (stated := json.loads(published.metadata.get(IMAGE_TARGET_KEY, "null"))) is not None:
            image_target = TypeAdapter(ImageTarget).validate_python(stated)
        words, heads = _num_words(section, state), _heads(state, section.patch_size, image_target)
        full = skeleton(section, max(words, 1), heads)
        absent = {full.part_of(name) for name in full.state_dict() if name not in state} - set(full.HEAD_PARTS)
        check_fit(full, state, f"{path}: the model", frozenset(absent))
        _check_types(state, path)
    tokenizer = _tokenizer(storage, vocabulary, folder if chosen.config is not None else None, words)
    tokens = list(tokenizer.tokens) if tokenizer is not None else []
    choices = choices_of_published(storage, published, heads.answers, heads.classes, heads.nlvr2, answers)
    config = _config(out, section.model_dump(mode="json"), _stages(section, heads, full, state), tokenizer)
    stage = config.stages[-1].name
    metadata = {
        "config": config.model_dump(mode="json"),
        "stage": stage,
        "step": 0,
        "absent": sorted(absent),
        "imported": {"from": path, "format": format_name},
    }
    save_weights(storage, out, state, tokens, metadata, choices)
    return {
        "checkpoint": out,
        "model": section.model_dump(mode="json"),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "absent": sorted(absent),
        "objectives": [objective for stage in config.stages for objective in stage.objectives],
        "choices": {name: len(names) for name, names in choices.items()},
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
    data = write_tensors(published, out, {"format": "pt", **_header(weights)})
    reread = chosen.read(read_tensors(data, out).tensors, section, ())
    left_out = weights.tensors.keys() - reread.keys()
    changed = [n for n in reread if chosen.exact and not torch.equal(reread[n], weights.tensors[n])]
    assert not changed, f"format {format_name} changes {', '.join(changed)}"
    if storage.exists(out) and storage.read(out) != data:
        raise ConfigError(f"--out {out}: would overwrite another file; give another name, or delete it")
    storage.write(out, data)
    return {
        "path": out,
        "format": format_name,
        "tensors": len(published),
        "bytes": len(data),
        "left_out": sorted(left_out),  # what the format has no names for
    }


@contextmanager
def _damage_named(path: str, format_name: str) -> Iterator[None]:
    """Tensors of any shapes under a format's names end in CheckpointError, whatever a converter trips over."""
    try:
        yield
    except MomeError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: its tensors are not those of a model in the format {format_name} "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _check_types(state: dict[str, Tensor], path: str) -> None:
    """Integers of a quantised model are no weights without their scales."""
    others = {name: str(tensor.dtype) for name, tensor in state.items() if not tensor.is_floating_point()}
    if others:
        name, kind = next(iter(others.items()))
        raise CheckpointError(
            f"{path}: {len(others)} of {len(state)} tensors hold {kind.removeprefix('torch.')} ({name}); expected "
            "floating-point weights. Give the checkpoint that was not quantised"
        )


def _header(weights: Weights) -> dict[str, str]:
    """Return the header of an exported file, from which it can be imported without sizes and with equal predictions."""
    stages = weights.config.stages
    index = stages.index(weights.config.stage_named(weights.stage))
    target = head_config(weights.config, index).image_target
    return {
        MODEL_KEY: weights.config.model.model_dump_json(),
        **({} if target is None else {IMAGE_TARGET_KEY: json.dumps(target)}),
        **{name: choices.to_bytes().decode() for name, choices in weights.choices.items()},
    }


def _section(published: Published, chosen: Format, model: Path | None, overrides: Iterable[str]) -> TransformerConfig:
    defined: dict[str, Any] = {}
    if model is not None:
        defined = load_config(model).model.model_dump(mode="json")
    elif (own := _own_section(published)) is not None:
        defined = own
    elif chosen.config is not None:
        if published.config is not None:
            defined = chosen.config.section(published.config)
        defined |= chosen.config.reading(published.processor or {})
    for override in overrides:
        apply_override(defined, override)
    inferred = chosen.infer(published.tensors, defined)
    if chosen.config is not None and published.config is not None:
        chosen.config.check(published.config, inferred)
    section = _config("imported", inferred, [_stage("images", ["mim"])], None).model
    if chosen.kinds is not None and section.kind not in chosen.kinds:
        raise ConfigError(f"the format holds models of kind {', '.join(chosen.kinds)}, not {section.kind}")
    layers = max(value for key, value in section.model_dump().items() if key in ("layers", "text_layers"))
    if layers > len(published.tensors):
        raise CheckpointError(f"{layers} layers are claimed, and the file holds {len(published.tensors)} tensors")
    return section


def _own_section(published: Published) -> dict[str, Any] | None:
    """The section in the header of a file that we wrote; None for others' files, which may have a key of that name."""
    try:
        section = read_json(published.metadata.get(MODEL_KEY, "").encode(), "the file's header")
    except CheckpointError:
        return None
    return section if "kind" in section else None


def _config(out: str, section: dict[str, Any], stages: list[dict[str, Any]], tokenizer: Tokenizer | None) -> RunConfig:
    """Return the config stored with imported weights. Its folder is `out`, if that is a valid run name."""
    output, _, name = out.rstrip("/").rpartition("/")
    values = {
        "name": name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) else "imported",
        "output": output or ".",
        "model": section,
        "sources": {source_type: {"shards": NO_SOURCE, "type": source_type} for source_type in USES},
        "stages": stages,
    }
    if tokenizer is not None and tokenizer.lowercase == is_cased(tokenizer.tokens):
        values["tokenizer"] = {"lowercase": tokenizer.lowercase}  # as stated next to the vocabulary
    return validate(values, "imported weights")


def _stage(
    source_type: SourceType, objectives: list[str], heads: HeadConfig = HeadConfig(), max_text_length: int = 1
) -> dict[str, Any]:
    negatives = "hard" if "itc" in objectives else "random"
    target: dict[str, Any] = {} if heads.image_target is None else {"image_target": heads.image_target}
    if heads.image_target == "visual_tokens":
        target["image_tokenizer"] = {"weights": NO_SOURCE, "tokens": heads.visual_tokens}
    return {
        "name": f"imported_{source_type}",
        "sources": {source_type: 1.0},
        "objectives": {objective: {} for objective in objectives},
        "steps": 1,
        "global_batch_size": DataConfig().streams,
        "max_text_length": max_text_length,
        "negatives": negatives,
        "num_classes": heads.classes,
        "num_answers": heads.answers,
        **target,
    }


def _stages(
    section: TransformerConfig, heads: HeadConfig, model: Model, state: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """A stage for every use of data that a head of the weights serves."""
    absent = {model.part_of(name) for name in model.state_dict() if name not in state}
    present = {model.part_of(name) for name in state} - absent  # a head that would be drawn in part serves nothing
    max_text_length = min(section.max_text_length, MAX_TEXT)

    def serves(objective: str, source_type: SourceType) -> bool:
        needed = (modules_for(model, objective, source_type) or frozenset()) & set(model.HEAD_PARTS)
        return bool(needed) and needed <= present

    objectives = {
        source_type: [name for name in objective_names() if serves(name, source_type)] for source_type in USES
    }
    stages = [_stage(source_type, names, heads, max_text_length) for source_type, names in objectives.items() if names]
    return stages or [_stage("images", ["mim"], heads, max_text_length)]


def _heads(state: dict[str, Tensor], patch_size: int, target: ImageTarget | None) -> HeadConfig:
    """Return the heads contained in weights of ours, as a stage would configure them.

    `target` is the masked-image head's target; if None, it is inferred from the number of the head's outputs.
    """
    outputs = _rows(state, "mim_head.predict.bias")
    known: dict[int, ImageTarget] = {COLOUR_CLASSES: "mean_colour", 3 * patch_size**2: "pixels"}
    image_target = None if not outputs else target or known.get(outputs, "visual_tokens")
    return HeadConfig(
        image_target=image_target,
        visual_tokens=outputs if image_target == "visual_tokens" else 0,
        classes=_rows(state, "classification_head.classify.bias") or None,
        answers=_rows(state, "vqa_head.classify.bias") or None,
        nlvr2=any(name.startswith("nlvr2_head.") for name in state),
        ranking=any(name.startswith("ranking_head.") for name in state),
    )


def _rows(state: dict[str, Tensor], name: str) -> int:
    return len(state[name]) if name in state else 0


def _num_words(section: TransformerConfig, state: dict[str, Tensor]) -> int:
    """The vocabulary of the weights: the rows of whatever grows with it. 0 for a model that reads no text."""
    small, large = (dict(skeleton(section, vocabulary).named_parameters()) for vocabulary in (1, 2))
    return next((len(state[name]) for name in small if small[name].shape != large[name].shape and name in state), 0)


def _tokenizer(storage: Storage, vocabulary: str | None, folder: str | None, words: int) -> Tokenizer | None:
    """A vocabulary file, or the weights' folder's: one token for each row of the word embedding. None without rows."""
    if not words:
        return None
    bundled = vocabulary_of(storage, folder) if vocabulary is None and folder is not None else None
    if vocabulary is None and bundled is None:
        raise ConfigError(
            f"the weights know {words} tokens, but not which; name the vocabulary file they were trained with, one "
            "token a line, with --vocabulary (published models: bert-base-uncased's vocab.txt)"
        )
    tokenizer = Tokenizer.load(storage, vocabulary) if vocabulary is not None else bundled
    assert tokenizer is not None
    if tokenizer.size != words:
        where = f"--vocabulary {vocabulary}" if vocabulary is not None else f"the vocabulary in {folder}"
        raise ConfigError(f"{where}: has {tokenizer.size} tokens, the weights have {words}")
    return tokenizer
