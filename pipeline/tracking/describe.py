"""Description of a run for MLflow: config as params and tags, environment, recipe hash, and a Markdown summary."""

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
# Tags that ranks cannot determine themselves: the launcher passes them in these environment variables.
PROPAGATED_TAGS = {
    "ray.submission_id": "MOME_SUBMISSION_ID", "image_digest": "MOME_IMAGE_DIGEST",
    COMMIT: "MOME_GIT_COMMIT", DIRTY: "MOME_GIT_DIRTY",
}  # fmt: skip
_INVALID_IN_KEYS = re.compile(r"[^\w.\-/ :]")  # characters that MLflow rejects in names of metrics, params and tags
CONFIG_TAG = "config."  # prefix of the tags of config keys that may change on resume
# Config sections without influence on what is learnt: names, locations, machines, monitoring.
NOT_OF_RECIPE = {"name", "output", "seed", "storage", "cluster", "guards", "checkpoint", "tracking", "evaluation"}


def run_tags(config: RunConfig) -> dict[str, str]:
    """Return the tags of the parent run: user, host, versions, commit, recipe hash, and a summary in Markdown."""
    tags = {"mlflow.source.name": "mome", "mlflow.source.type": "JOB", "mome.host": socket.gethostname()}
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no entry in the password database
        tags["mlflow.user"] = getpass.getuser()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    tags |= code_tags() | {tag: os.environ[name] for tag, name in PROPAGATED_TAGS.items() if os.environ.get(name)}
    # The recipe hash is equal for runs that differ in names, seeds and machines only.
    recipe: dict[str, Any] = config.model_dump(mode="json", exclude=NOT_OF_RECIPE)
    for source in recipe["sources"].values():
        del source["shards"]  # the location; the data digest covers the content
    del recipe["data"]["loader"], recipe["data"]["cache"]
    recipe["engine"] = {"precision": config.engine.precision}
    tags["recipe_hash"] = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    lines = [f"**{config.name}**: {config.model.kind}, {config.total_steps:,} steps in {config.folder}", ""]
    lines += ["| stage | objectives | sources | steps | batch | starts from |", "|---|---|---|---|---|---|"]
    for stage in config.stages:
        reads = f"{stage.name} | {', '.join(stage.objectives)} | {sources_text(stage)}"
        lines.append(f"| {reads} | {stage.steps:,} | {stage.global_batch_size:,} | {stage.start_from} |")
    return tags | {"mlflow.note.content": redact("\n".join(lines))}


def sources_text(stage: StageConfig) -> str:
    """Return the names of a stage's sources with their fractions of the examples."""
    total = sum(stage.sources.values())
    if len(stage.sources) == 1:
        return next(iter(stage.sources))
    return ", ".join(f"{weight / total:.0%} {name}" for name, weight in stage.sources.items())


def code_tags() -> dict[str, str]:
    """Return the commit of this checkout and whether it has changes; no tags outside a checkout."""
    tree, outputs = Path(__file__).resolve().parents[2], []
    for command in (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain"]) if (tree / ".git").exists() else ():
        try:
            done = subprocess.run(command, check=True, cwd=tree, capture_output=True, text=True, timeout=5)
            outputs.append(done.stdout.strip())
        except (OSError, subprocess.SubprocessError):
            outputs.append("")
    commit, changes = outputs or ("", "")
    return {COMMIT: commit, DIRTY: str(bool(changes)).lower()} if commit else {}


def config_yaml(config: RunConfig, exclude_defaults: bool = False) -> str:
    """Return the config as YAML with secrets redacted: complete, or only the keys that differ from the defaults."""
    values = redact_values(config.model_dump(mode="json", exclude_defaults=exclude_defaults))
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def split_changeable(values: dict[str, Any], prefix: str = "") -> tuple[dict[str, str], dict[str, str]]:
    """Return the flattened config as (params, tags): keys that may change on resume, which params cannot, are tags."""
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
    """Return `name` with characters replaced that MLflow rejects."""
    return posixpath.normpath(_INVALID_IN_KEYS.sub("_", name)).lstrip("/")
