"""`mome train --preflight` on Ray: the ranks are placed as a run's are, each checks, and nobody trains."""

from __future__ import annotations

from typing import Any

from jobs.rank import as_told, loader_backend
from jobs.shared import answer_of
from pipeline.config.errors import MomeError
from pipeline.config.schema import RunConfig
from pipeline.training.preflight import preflight


def preflight_on_ray(config: RunConfig) -> dict[str, Any]:
    """What was checked, with seconds, by its name. Raises MomeError with the first failure, on whichever rank."""
    checked: dict[str, Any] = answer_of(check_rank, config, "preflight")["checked"]
    return checked


def check_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """What Ray Train runs on each worker. A failure is returned: Ray would try it again."""
    config = RunConfig.model_validate_json(loop_config["config"])
    try:
        found = preflight(config, lambda _: None, loader_backend(config))
    except MomeError as error:
        return {"failure": as_told(error)}
    return {"checked": {each.what: {"told": each.told, "seconds": each.seconds} for each in found}}
