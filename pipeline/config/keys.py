"""Keys of the schema by their dotted paths, and suggestions for unknown names.

NAME in a path is the name of a stage, a source or a filter: `stages.NAME.optimizer.lr`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from pipeline.config.schema import RunConfig

# Names of open_clip, Hugging Face's Trainer and configs, torchtitan and Lightning, by the key that has their meaning.
SYNONYMS = {
    "name": "run_name exp_name experiment_name job_name",
    "output": "output_dir out_dir dump_folder logs save_dir default_root_dir checkpoint_dir",
    "cluster.workers": "gpus num_gpus n_gpus devices world_size nproc_per_node num_processes num_nodes ranks",
    "engine.precision": "bf16 fp16 mixed_precision dtype amp param_dtype",
    "engine.micro_batch_size": "micro_batch per_device_train_batch_size per_gpu_batch_size local_batch_size accum_freq "
    "gradient_accumulation_steps accumulate_grad_batches device_batch_size",
    "engine.activation_checkpointing": "gradient_checkpointing grad_checkpointing activation_checkpoint remat",
    "engine.compile": "torchcompile torch_compile",
    "engine.zero_stage": "zero deepspeed stage data_parallel_shard_degree fsdp",
    "data.loader.num_workers": "dataloader_num_workers loader_workers n_workers",
    "data.loader.prefetch_batches": "prefetch_factor dataloader_prefetch_factor",
    "data.shuffle_window": "shuffle_buffer buffer_size dataset_shuffle",
    "stages.NAME.global_batch_size": "batch_size train_batch_size total_batch_size batch bs",
    "stages.NAME.steps": "epochs num_train_epochs num_epochs max_epochs max_steps num_steps total_steps iters",
    "stages.NAME.max_text_length": "seq_len seq_length max_seq_length context_length max_len max_length",
    "stages.NAME.start_from": "pretrained resume_from init_from load_from pretrained_model model_name_or_path",
    "stages.NAME.optimizer.lr": "learning_rate base_lr peak_lr max_lr peak_rate",
    "stages.NAME.optimizer.lr_schedule": "lr_scheduler lr_scheduler_type scheduler",
    "stages.NAME.optimizer.warmup_steps": "warmup warmup_ratio num_warmup_steps warmup_epochs",
    "stages.NAME.optimizer.weight_decay": "wd",
    "stages.NAME.optimizer.max_grad_norm": "grad_clip_norm grad_clip gradient_clip_val clip_grad max_norm",
    "stages.NAME.optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "stages.NAME.optimizer.eps": "adam_epsilon epsilon",
    "stages.NAME.objectives": "losses loss tasks task loss_names objective",
    "stages.NAME.masking.mlm_probability": "mlm_prob mask_prob mask_ratio",
    "sources.NAME.shards": "train_data data_path dataset dataset_path train_data_dir data_root datasets url path",
    "evaluation.source": "val_data eval_data validation_data test_data",
    "evaluation.every": "eval_steps val_frequency val_check_interval eval_interval",
    "checkpoint.every": "save_steps save_frequency save_interval save_every checkpoint_interval",
    "checkpoint.keep": "save_total_limit keep_latest_k max_keep",
    "tracking.uri": "report_to mlflow mlflow_uri tracking_uri wandb",
    "tracking.metrics_every": "logging_steps log_every_n_steps log_freq log_every",
    "tokenizer.vocabulary": "vocab vocab_file tokenizer_path tokenizer_name",
    "tokenizer.size": "vocab_size",
    "model.kind": "arch architecture model_name model_type",
    "model.width": "hidden_size embed_dim d_model n_embd dim",
    "model.layers": "num_hidden_layers num_layers depth n_layers n_layer",
    "model.heads": "num_attention_heads num_heads n_heads n_head",
    "model.mlp_ratio": "intermediate_size mlp_dim ffn_dim",
    "model.max_text_length": "max_position_embeddings max_text_len",
    "model.image_size": "img_size resolution input_size force_image_size",
    "model.init_std": "initializer_range initial_std",
    "model.norm_eps": "layer_norm_eps",
    "model.drop_path": "drop_path_rate stochastic_depth",
}
MAX_SUGGESTIONS = 3


class Key(NamedTuple):
    """A key of the schema; `default` is JSON, empty for a section and for null."""

    path: str
    type: str
    default: str
    is_required: bool
    is_changeable: bool
    description: str


class SectionKeys(NamedTuple):
    """A section: its place in a config, such as `stages[].optimizer`, and its kind if the place has several."""

    place: str
    kind: str
    description: str
    keys: tuple[Key, ...]


@cache
def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config, which accepts a model without `kind` as one of the default kind."""
    schema = RunConfig.model_json_schema()
    model = schema["properties"]["model"]  # `oneOf` would refuse it, because it may be of every kind
    model["anyOf"] = model.pop("oneOf")
    del model["discriminator"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@cache
def sections() -> tuple[SectionKeys, ...]:
    """Return all sections with their keys, depth first."""
    schema = json_schema()
    result, pending = list[SectionKeys](), [("", "", schema)]
    while pending:
        place, kind, section = pending.pop(0)
        inner, keys = [], []
        for name, key in section["properties"].items():
            # The sections that the value may be, and what follows the key in their paths.
            many, suffix = (key["items"], "[]") if "items" in key else (key.get("additionalProperties"), ".NAME")
            value, suffix = (many, suffix) if isinstance(many, dict) else (key, "")
            choices = value.get("anyOf", value.get("oneOf", [value]))
            defined = [schema["$defs"][choice["$ref"].rpartition("/")[2]] for choice in choices if "$ref" in choice]
            path = f"{place}.{name}".lstrip(".")
            for choice in defined:
                inner.append((path + suffix, choice["properties"].get("kind", {}).get("const", ""), choice))
            default, is_required = key.get("default", key.get("const")), name in section.get("required", ())
            text = "" if default is None or defined else json.dumps(default, ensure_ascii=False)
            described = (is_required, bool(key.get("changeable")), key.get("description", ""))
            keys.append(Key(path.replace("[]", ".NAME"), _type(key), text, *described))
        result.append(SectionKeys(place, kind, section["description"], tuple(keys)))
        pending = inner + pending
    return tuple(result)


def _type(key: Mapping[str, Any], plural: str = "") -> str:
    """Return the type of a key in words, with its bounds; `plural` is 's' for the type of several values."""
    choices = [choice for choice in key.get("anyOf", key.get("oneOf", [])) if choice.get("type") != "null"]
    if choices:
        return " or ".join(dict.fromkeys(_type(choice, plural) for choice in choices))
    if "$ref" in key:
        return f"section{plural}"
    if "const" in key or "enum" in key:
        return " or ".join(f"`{json.dumps(value)}`" for value in key.get("enum", [key.get("const")]))
    if key["type"] == "array":
        items = key.get("prefixItems")
        return f"list of {len(items)} numbers" if items else f"list of {_type(key['items'], 's')}"
    if key["type"] == "object":
        return f"mapping of names to {_type(key['additionalProperties'], 's')}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {key[name]:g}" for name, sign in signs.items() if name in key and key[name] < 1e9]
    return " ".join([f"{key['type']}{plural}", *([", ".join(limits)] if limits else [])])


@cache
def paths() -> dict[str, str]:
    """Return the paths of all keys, with the kinds of model that have each if it is not a key of all."""
    kinds: dict[str, list[str]] = {}
    for section in sections():
        for key in section.keys:
            kinds.setdefault(key.path, []).append(section.kind)
    return {path: ", ".join(filter(None, names)) for path, names in kinds.items()}


def find_keys(name: str) -> list[str]:
    """Return the paths for a path, the end of a path, a synonym or a misspelt name, best first.

    `stages.pairs.steps` matches `stages.NAME.steps`. Of a path with an unknown beginning, such as `training.steps`, the
    rest is searched.
    """
    name = name.removeprefix("--").replace("-", "_")
    if whole := [path for path in paths() if re.fullmatch(path_pattern(path), name)]:
        return [name] if name in whole else whole
    parts = name.lower().split(".")
    for depth in range(len(parts)):
        rest = ".".join(parts[depth:])
        synonyms = [path for path, names in SYNONYMS.items() if rest in names.split()]
        if matches := synonyms + _endings(rest):
            return list(dict.fromkeys(matches))
    own, other = sorted({path.rpartition(".")[2] for path in paths()}), " ".join(SYNONYMS.values()).split()
    close = [match for known in (own, other) for match in difflib.get_close_matches(parts[-1], known, 1, cutoff=0.75)]
    return find_keys(close[0]) if close else []


def suggestion(
    location: Sequence[str], inner: Sequence[str], siblings: Sequence[str], values: Mapping[str, Any]
) -> str:
    """Return "did you mean …?" for an unknown key at `location` of a config with `values`; empty if nothing is similar.

    `siblings` are the known keys of its section, which are suggested by name; any other key is suggested by its path,
    with the config's own stages or sources at NAME. `inner` are the paths inside its value, if that is a mapping.
    """
    *parents, last = location
    section, close = ".".join(parents), difflib.get_close_matches(last, siblings, n=1)
    is_misspelt = not any(last in names.split() for names in SYNONYMS.values()) and not _endings(last)
    if close and is_misspelt and (not inner or any(_endings(f"{close[0]}.{key}") for key in inner)):
        return f"did you mean '{close[0]}'?"
    matches = [path for key in inner for path in find_keys(f"{last}.{key}")] or find_keys(last)
    names: dict[str, str] = {}  # of the matches in this section
    for path in matches:
        parent, _, name = path.rpartition(".")
        names |= {name: path} if re.fullmatch(path_pattern(parent), section) else {}
    if last in names:
        return f"it is a key of model.kind {paths()[names[last]]}"
    note = " (steps = epochs x samples / global_batch_size)" if "epoch" in last else ""
    known = [name for name in names if name in siblings]
    below = [path for path in matches if parents and path.startswith(f"{parents[0]}.")]
    if known or (close and parents and not below):
        return f"did you mean '{(known or close)[0]}'?{note}"
    shown = list(dict.fromkeys(name for path in below or matches for name in _with_names(path, location, values)))
    *first, final = shown[:MAX_SUGGESTIONS] or [""]
    listed = f"{', '.join(first)} or {final}" if first else final
    return f"did you mean {listed}?{note}" if final else ""


def _endings(name: str) -> list[str]:
    """Return the paths that end with `name`."""
    return [path for path in paths() if f".{path}".endswith(f".{name}")]


def path_pattern(path: str) -> str:
    """Return a regular expression for a path, with any name at NAME."""
    return re.escape(path).replace("NAME", r"[^.]+")


def _with_names(path: str, location: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return a path with the names of the config's stages or sources at its first NAME, at `location` the only one."""
    section, stages, sources = path.partition(".")[0], values.get("stages"), values.get("sources")
    names = [str(name) for name in sources] if section == "sources" and isinstance(sources, Mapping) else []
    if section == "stages" and isinstance(stages, list):
        names = [str(stage["name"]) for stage in stages if isinstance(stage, Mapping) and "name" in stage]
    if location[0] == section and len(location) > 1 and location[1] in names:
        names = [location[1]]
    return [path.replace("NAME", name, 1) for name in names] if names and "NAME" in path else [path]
