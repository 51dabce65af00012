"""Places of this machine: which URLs of a run are local, and what they are wherever a rank's working folder lies."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config.load import apply_override, validate
from pipeline.config.schema import RunConfig


def is_local(url: str) -> bool:
    """Whether a URL names a file or folder of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The absolute path of a local URL."""
    return Path(url.removeprefix("file://")).expanduser().absolute()


def absolute(url: str) -> str:
    """The same place whatever the working folder."""
    return str(local_path(url)) if is_local(url) else url


def local_paths(config: RunConfig) -> dict[str, str]:
    """Dotted path -> value of every key that names a folder or file of this machine's own."""
    places = {"output": config.output}
    places |= {f"sources.{name}.shards": source.shards for name, source in config.sources.items()}
    places |= {
        f"sources.{name}.opt_out": source.opt_out
        for name, source in config.sources.items()
        if source.opt_out is not None
    }
    places |= {
        f"stages.{index}.start_from": stage.start_from
        for index, stage in enumerate(config.stages)
        if stage.start_from not in ("previous", "random")
    }
    if config.tokenizer.vocabulary is not None:
        places["tokenizer.vocabulary"] = config.tokenizer.vocabulary
    return {path: value for path, value in places.items() if is_local(value)}


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, its local paths absolute: a rank may have another working folder than the driver."""
    values = config.model_dump(mode="json", exclude_unset=True)
    places = local_paths(config)
    if config.data.cache.folder is not None:  # of each node's own: no place that the machines must share
        places["data.cache.folder"] = config.data.cache.folder
    for path, value in places.items():
        apply_override(values, f"{path}={json.dumps(str(local_path(value)))}")
    return validate(values, config.name)
