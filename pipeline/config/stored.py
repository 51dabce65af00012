"""Configs read from the folder of a run or of weights, which somebody else may have written.

Such a config says what was trained, and on what. It decides neither whom this machine talks to, nor which secrets it
sends, nor where anything is written: `stored_config` replaces all of that, and nothing else may parse one to act on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.config.errors import ConfigError
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.config.urls import absolute, is_local

# Stores that are reached by an account of the caller's. The URL of any other names a host, which a request would tell
# who reads the folder, and when.
STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "hf", "memory"})


@dataclass(frozen=True)
class Recorded:
    """Where a stored config says that its run lies and was tracked: shown and compared, never used."""

    folder: str
    tracking_uri: str | None


def parse_config(data: bytes | str, where: str) -> RunConfig:
    """Return the config in a file that `mome` wrote, as it stands there without passwords: to compare and to show.

    Raises ConfigError, with `where` it was read from, for anything else.
    """
    try:
        return RunConfig.model_validate_json(json.dumps(_without_secrets(json.loads(data))))
    except ValidationError as error:
        raise ConfigError(
            f"{where}: not a config of this version ({error.error_count()} faults, the first: "
            f"{error.errors()[0]['msg']}). Read it with the version that wrote it, or give the run another `name`"
        ) from None
    except Exception as error:  # rules that a damaged config breaks before they can judge it
        raise ConfigError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def _without_secrets(values: Any) -> Any:
    """Take the user part out of addresses that earlier versions recorded with it; this version refuses them."""
    for section, key in (("tracking", "uri"), ("storage", "endpoint_url")):
        found = values.get(section) if isinstance(values, dict) else None
        if isinstance(found, dict) and isinstance(found.get(key), str):
            found[key] = redact(found[key])
    return values


def stored_config(values: Any, where: str, folder: str) -> tuple[RunConfig, Recorded]:
    """Return the config that lies in `folder` as this machine may act on it, and what it says of its places.

    Its folder is `folder`, wherever it was written. Endpoints, secret references, the MLflow and Ray addresses are
    those of the environment: of its storage section only the deadline is taken. Raises ConfigError as `parse_config`.
    """
    try:
        text = json.dumps(values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    config = parse_config(text, where)
    recorded = Recorded(config.folder, config.tracking.uri)
    output, _, name = absolute(folder.rstrip("/") or "/").rpartition("/")
    located = config.model_copy(
        update={
            "output": output or "/",
            "name": name or config.name,
            "storage": StorageConfig(retry_timeout_seconds=config.storage.retry_timeout_seconds),
            "tracking": config.tracking.model_copy(update={"uri": None}),
            "cluster": config.cluster.model_copy(update={"address": None}),
        }
    )
    return located, recorded


def check_stored_url(url: str, key: str) -> None:
    """Raise ConfigError for a URL of a stored config that names a host to be asked, or runs through another URL."""
    if "::" in url or not (is_local(url) or url.partition("://")[0] in STORES):
        raise ConfigError(
            f"{key}: {url}: a stored config may not have this machine ask another host; give the URL yourself, "
            "with --source"
        )
