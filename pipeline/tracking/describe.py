"""What a run is, in MLflow's terms: its config as params and tags, where it came from, its recipe, and a summary."""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import importlib.metadata
import json
import os
import posixpath
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.load import flatten, is_changeable
from pipeline.config.redaction import redact, redact_values
from pipeline.config.schema import RunConfig, StageConfig

PACKAGES = ("mome", "torch", "deepspeed", "ray", "mlflow", "webdataset", "transformers", "numpy", "pydantic")
COMMIT, DIRTY = "mlflow.source.git.commit", "mome.git.dirty"
# Told to every rank by who starts them: the Ray job that the run is, the commit of the code that was sent along without
# its history, and the image that its containers are of.
TOLD = {
    "ray.submission_id": "MOME_SUBMISSION_ID",
    COMMIT: "MOME_GIT_COMMIT",
    DIRTY: "MOME_GIT_DIRTY",
    "image_digest": "MOME_IMAGE_DIGEST",
}
_NOT_IN_KEYS = re.compile(r"[^\w.\-/ :]")  # what MLflow refuses in the name of a metric, param or tag
CONFIG_TAG = "config."  # begins the tags of keys that may change on resume
# Of a config, what says nothing of what is learnt: names, places, machines, and how the run is watched.
NOT_OF_RECIPE = ("name", "output", "seed", "storage", "cluster", "guards", "checkpoint", "tracking", "evaluation")


def recipe_hash(config: RunConfig) -> str:
    """Equal for runs that learn the same from the same kinds of sources, whatever their names, seeds and machines."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude=set(NOT_OF_RECIPE))
    for source in values["sources"].values():
        del source["shards"]  # where they lie; what they hold is the plan's digest
    for key in ("loader", "cache"):
        del values["data"][key]
    values["engine"] = {"precision": values["engine"]["precision"]}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def note_of_run(config: RunConfig) -> str:
    """Markdown, which MLflow shows above a run's tags."""
    lines = [f"**{config.name}**: {config.model.kind}, {config.total_steps:,} steps in {config.folder}", ""]
    lines += ["| stage | learns | from | steps | batch | starts from |", "|---|---|---|---|---|---|"]
    for stage in config.stages:
        cells = [
            stage.name,
            ", ".join(stage.objectives),
            _sources(stage),
            f"{stage.steps:,}",
            f"{stage.global_batch_size:,}",
        ]
        lines.append("| " + " | ".join([*cells, stage.start_from]) + " |")
    return "\n".join(lines)


def note_of_stage(stage: StageConfig, origin: str) -> str:
    """The same of a stage; `origin`: the weights that it started from, or 'random'."""
    return (
        f"**{stage.name}**: {', '.join(stage.objectives)} from {_sources(stage)}; {stage.steps:,} steps of "
        f"{stage.global_batch_size:,} samples. Started from {'random weights' if origin == 'random' else origin}."
    )


def _sources(stage: StageConfig) -> str:
    total = sum(stage.sources.values())
    if len(stage.sources) == 1:
        return next(iter(stage.sources))
    return ", ".join(f"{weight / total:.0%} {name}" for name, weight in stage.sources.items())


def environment_tags() -> dict[str, str]:
    """Who started this process, where, with which code and packages."""
    tags = {"mlflow.source.name": "mome", "mlflow.source.type": "JOB", "mome.host": socket.gethostname()}
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return tags | code_tags() | {tag: os.environ[name] for tag, name in TOLD.items() if os.environ.get(name)}


def code_tags() -> dict[str, str]:
    """The commit that this code is of, and whether it was changed since; nothing outside a checkout."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists() or (commit := _git(tree, "rev-parse", "HEAD")) is None:
        return {}
    return {COMMIT: commit, DIRTY: str(bool(_git(tree, "status", "--porcelain"))).lower()}


def told_environment(submission_id: str) -> dict[str, str]:
    """What to set for the ranks of a job that this checkout's code is sent to."""
    tags = code_tags() | {"ray.submission_id": submission_id}
    return {TOLD[tag]: value for tag, value in tags.items()}


def _git(tree: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], check=False, cwd=tree, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def resolved_config(config: RunConfig) -> str:
    """Every key of the run as YAML, defaults included."""
    return _as_yaml(config.model_dump(mode="json"))


def chosen_keys(config: RunConfig) -> str:
    """The keys of the run that differ from the defaults, as YAML."""
    return _as_yaml(config.model_dump(mode="json", exclude_defaults=True))


def _as_yaml(values: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(redact_values(values), sort_keys=False, allow_unicode=True)
    return text


def split_changeable(values: dict[str, Any], prefix: str = "") -> tuple[dict[str, str], dict[str, str]]:
    """Flattened (params, tags): MLflow's params are immutable, so what may change on resume is tagged instead."""
    params, tags = {}, {}
    for path, value in flatten(values).items():
        text = redact(value if isinstance(value, str) else json.dumps(value))
        if is_changeable(f"{prefix}.{path}" if prefix else path):
            tags[f"{CONFIG_TAG}{clean_key(path)}"] = text
        else:
            params[clean_key(path)] = text
    return params, tags


@functools.lru_cache(maxsize=4096)
def clean_key(name: str) -> str:
    """The name as MLflow takes it for a metric, param or tag."""
    return posixpath.normpath(_NOT_IN_KEYS.sub("_", name)).lstrip("/")
