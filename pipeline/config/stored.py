"""Configs stored with runs and weights, which may come from an untrusted author.

A stored config describes what was trained and on which data. It must not decide which hosts this machine contacts,
which secrets it sends or where it writes: `stored_config` replaces those keys. Use no other function to act on one.
"""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.config.errors import ConfigError
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.config.urls import absolute, is_local

# Stores that are accessed with the caller's own account. Any other URL names a host, and a request to it would reveal
# who reads the folder and when.
STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "hf", "memory"})


@dataclass(frozen=True)
class RecordedLocation:
    """The run folder and tracking URI recorded in a stored config; for display and comparison only."""

    folder: str
    tracking_uri: str | None


def parse_config(data: Any, where: str) -> RunConfig:
    """Return the config that `mome` wrote, as text or plain values, without passwords, for display and comparison.

    Raises ConfigError, naming `where` it was read from, for any other content.
    """
    try:
        values = json.loads(data if isinstance(data, bytes | str) else json.dumps(data))
        for section, key in (("tracking", "uri"), ("storage", "endpoint_url")):
            keys = values.get(section) if isinstance(values, dict) else None
            if isinstance(keys, dict) and isinstance(keys.get(key), str):
                keys[key] = redact(keys[key])  # the schema refuses user names and passwords
        return RunConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(
            f"{where}: not a config of this version ({error.error_count()} faults, the first: "
            f"{error.errors()[0]['msg']}); read it with the version that wrote it, or choose another run `name`"
        ) from None
    except Exception as error:  # a damaged config may break the validators themselves
        raise ConfigError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def stored_config(values: Any, where: str, folder: str) -> tuple[RunConfig, RecordedLocation]:
    """Return the config stored in `folder` in a form that is safe to act on, and its recorded locations.

    The run's folder becomes `folder`, wherever it was written. Endpoints, secrets, MLflow and Ray addresses are those
    of the environment; of the storage section only the retry timeout is kept. Raises ConfigError as `parse_config`.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is damaged: expected a config, got {type(values).__name__}")
    config = parse_config(values, where)
    recorded = RecordedLocation(config.folder, config.tracking.uri)
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
    """Raise ConfigError for a URL of a stored config that names a host to contact, or chains another URL."""
    if "::" in url or not (is_local(url) or url.partition("://")[0] in STORES):
        raise ConfigError(
            f"{key}: {url}: a stored config must not make this machine contact another host; pass the URL yourself "
            "with --source"
        )
