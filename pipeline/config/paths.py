"""Places of this machine: which URLs of a run are local, and what they are wherever a rank's working folder lies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local, parse

__all__ = ["absolute", "is_local", "local_path", "local_paths", "with_absolute_paths"]


def local_path(url: str) -> Path:
    """Return the absolute path of a local URL. Raises ConfigError for any other."""
    protocol, path = parse(url)
    if protocol != "file":
        raise ConfigError(f"{url!r}: expected a folder or file of this machine; give a local path")
    return Path(path).absolute()


def absolute(url: str) -> str:
    """The same place whatever the working folder."""
    return str(local_path(url)) if is_local(url) else url


def file_name_of(name: str) -> str:
    """Return a name out of a config or a record as one part of a path: what would lead elsewhere is escaped as %XX."""
    return re.sub(r"[/\\\x00-\x1f\x7f]", lambda found: f"%{ord(found.group()):02X}", name)


def local_paths(config: RunConfig) -> dict[str, str]:
    """Return dotted path -> value of every key that names a folder or file of this machine."""
    return {".".join(map(str, key)): value for key, value in _local_keys(config).items()}


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the same run with absolute local paths: a rank may have another working folder than the driver."""
    values = config.model_dump(mode="json", exclude_unset=True)
    places = _local_keys(config)
    if config.data.cache.folder is not None:  # of each node's own: no place that the machines must share
        places["data", "cache", "folder"] = config.data.cache.folder
    for (*parents, last), value in places.items():
        target: Any = values
        for part in parents:
            target = target[part] if isinstance(part, int) else target.setdefault(part, {})
        target[last] = str(local_path(value))
    return validate(values, config.name)


def _local_keys(config: RunConfig) -> dict[tuple[str | int, ...], str]:
    """Return the keys, each as the parts of its path: a source's name may itself contain dots."""
    places: dict[tuple[str | int, ...], str | None] = {
        ("output",): config.output,
        ("tokenizer", "vocabulary"): config.tokenizer.vocabulary,
    }
    for name, source in config.sources.items():
        places["sources", name, "shards"] = source.shards
        places["sources", name, "opt_out"] = source.opt_out
    for index, stage in enumerate(config.stages):
        if stage.start_from not in ("previous", "random"):
            places["stages", index, "start_from"] = stage.start_from
        places["stages", index, "answer_list"] = stage.answer_list
        if stage.image_tokenizer is not None:
            places["stages", index, "image_tokenizer", "weights"] = stage.image_tokenizer.weights
    return {key: value for key, value in places.items() if value is not None and is_local(value)}
