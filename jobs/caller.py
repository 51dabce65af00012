"""Stores, Ray cluster and MLflow server of the user who runs a command on the folder of a run or checkpoint.

They come from the environment, from `--config FILE` and from `--uri`, and never from the folder, which another person
may have written (`pipeline.config.load`).
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config.load import RecordedLocation, load_config
from pipeline.config.redaction import redact
from pipeline.config.schema import ClusterConfig, RunConfig, Section, StorageConfig
from pipeline.config.urls import absolute
from pipeline.data.storage import Storage
from pipeline.tracking.locations import absolute_uri, configured_uri, default_uri, read_run_id

URI_VARIABLE = "MLFLOW_TRACKING_URI"


class Caller(Section):
    """Servers and stores that the user named; None leaves the choice to the environment."""

    storage: StorageConfig | None = None
    tracking_uri: str | None = None
    cluster: ClusterConfig | None = None

    @staticmethod
    def of(config: RunConfig) -> Caller:
        """Return the caller whose own config this is: it was read from a file that they named."""
        return Caller(storage=config.storage, tracking_uri=configured_uri(config), cluster=config.cluster)

    @staticmethod
    def named(config: Path | None = None, uri: str | None = None) -> Caller:
        """Return the caller who gave `--config` and `--uri`. Raises ConfigError as `load_config`."""
        if config is None:
            return Caller(tracking_uri=uri)
        own = load_config(config)
        return Caller(storage=own.storage, tracking_uri=uri or own.tracking.uri, cluster=own.cluster)

    @property
    def server(self) -> str | None:
        """The MLflow URI that the caller gave, or the environment; None where neither does."""
        return self.tracking_uri or os.environ.get(URI_VARIABLE)

    def store(self) -> Storage:
        """Return the access to stores that every URL is read and written by."""
        return Storage(self.storage or StorageConfig())

    def applied(self, stored: RunConfig) -> RunConfig:
        """Return a stored config with the caller's stores and servers, as a tracker or a cluster is given it."""
        tracking = stored.tracking.model_copy(update={"uri": self.server})
        own = {"storage": self.storage or StorageConfig(), "tracking": tracking}
        return stored.model_copy(update=own | {"cluster": self.cluster or stored.cluster})


def untracked_because(config: RunConfig, recorded: RecordedLocation, storage: Storage) -> str | None:
    """Return why results of a folder are not recorded in MLflow unless the caller asks for it; None where they are.

    `config` is as `Caller.applied` makes it. What is recorded without being asked for goes to the run that it is of,
    and to the server that this run was tracked by, if that is the caller's own too.
    """
    if read_run_id(config, storage) is None:
        return f"{config.folder} is no tracked run"
    places = [absolute(folder) for folder in (recorded.folder, config.folder)]
    if len({place if "://" in place else os.path.realpath(place) for place in places}) > 1:
        return f"it is a copy of {recorded.folder}"
    known, own = recorded.tracking_uri or default_uri(config.output), configured_uri(config)
    if redact(absolute_uri(known)) == redact(absolute_uri(own)):
        return None
    remedy = f"to record there, set {URI_VARIABLE}, or name the config that it was trained with (--config)"
    return f"the run was tracked at {redact(known)}; {remedy}"
