"""Configs of runs: the user's own servers and stores, the recipes, and the fingerprint of the data.

Servers and stores come from the environment, `--config` or `--uri`, never from a run's folder, which anyone may write.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from typing import Any, get_args

import yaml

from pipeline.config import schema
from pipeline.config.errors import ConfigError
from pipeline.config.load import RECIPES, with_absolute_paths
from pipeline.config.schema import ClusterConfig, RunConfig, Section, StorageConfig
from pipeline.data.storage import Storage
from pipeline.tracking.locations import configured_uri

URI_VARIABLE = "MLFLOW_TRACKING_URI"


class Caller(Section):
    """Servers and stores that the user named; None leaves the choice to the environment."""

    storage: StorageConfig = StorageConfig()  # every URL is read and written with it
    tracking_uri: str | None = None
    cluster: ClusterConfig | None = None

    @staticmethod
    def of(config: RunConfig) -> Caller:
        """Return the caller whose own config this is: it was read from a file that they named."""
        return Caller(storage=config.storage, tracking_uri=configured_uri(config), cluster=config.cluster)

    @property
    def server(self) -> str | None:
        """The MLflow URI that the caller gave, or the environment; None where neither does."""
        return self.tracking_uri or os.environ.get(URI_VARIABLE)

    def applied(self, stored: RunConfig) -> RunConfig:
        """Return a stored config with the caller's stores and servers, as a tracker or a cluster is given it."""
        tracking = stored.tracking.model_copy(update={"uri": self.server})
        own = {"storage": self.storage, "tracking": tracking}
        return stored.model_copy(update=own | {"cluster": self.cluster or stored.cluster})


def list_recipes() -> dict[str, str]:
    """Return the kind of model and the stages of every recipe by name, such as `finetune/vilt_b32_vqa`."""
    recipes = {}
    for path in sorted(RECIPES.rglob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = " → ".join(stage["name"] for stage in values["stages"])
        name = path.relative_to(RECIPES).with_suffix("").as_posix()
        recipes[name] = f"{values.get('model', {}).get('kind', 'vlmo')}: {stages}"
    return recipes


@cache
def source_types(kind: str) -> dict[str, list[str]]:
    """Return the source types from which a kind of model learns each objective; none if it does not learn it."""
    from pipeline.models import skeleton
    from pipeline.objectives import modules_for

    model, types = skeleton(schema.MODEL_SECTIONS[kind].model_validate({})), get_args(schema.SourceType)
    names = schema.OBJECTIVES
    return {name: [source for source in types if modules_for(model, name, source) is not None] for name in names}


def fingerprint_of(
    config: RunConfig, stage: str | None, steps: str, world_size: int, workers: int, threads: int
) -> dict[str, Any]:
    """Hash the batches of steps A:B, without writing to the run. Raises ConfigError whenever `mome train` would."""
    from pipeline.data.loading.loader import fingerprint
    from pipeline.objectives import batch_groups
    from pipeline.training.prepare import apart, prepare

    try:
        first, last = schema.parse_steps(steps)
    except ValueError as error:
        raise ConfigError(f"--steps {steps}: {error}") from None
    loader = config.data.loader.model_copy(update={"num_workers": workers, "threads_per_worker": threads})
    config = with_absolute_paths(config)
    config = config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})
    chosen, storage = config.stage_named(stage), Storage(config.storage)
    with tempfile.TemporaryDirectory(prefix="mome-fingerprint-") as folder:
        scratch = apart(config, storage, folder, config.name)
        tokenizer, groups = prepare(scratch, storage), batch_groups(scratch, chosen)
        digest = fingerprint(scratch, chosen, groups, storage, tokenizer, range(first, last), world_size)
    return {"fingerprint": digest, "steps": [first, last], "stage": chosen.name}
