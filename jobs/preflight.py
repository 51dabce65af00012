"""`mome train --preflight` on Ray: the ranks are placed as a run's are, each checks, and nobody trains."""

from __future__ import annotations

from typing import Any

from jobs.cluster import connect, on_ranks
from jobs.pretrain import for_ranks
from jobs.rank import as_error, as_told, preparer_of
from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.schema import RunConfig
from pipeline.training.preflight import preflight


def preflight_on_ray(config: RunConfig) -> dict[str, Any]:
    """What was checked, with seconds, by its name. Raises MomeError with the first failure, on whichever rank."""
    config = for_ranks(config)
    connect(config.cluster)
    try:
        answer = on_ranks(check_rank, config, f"{config.name}-preflight")
    except Exception as error:
        raise RunFailed(f"preflight: a rank was lost: {str(error).strip().splitlines()[-1]}") from error
    if "failure" in answer:
        raise as_error(answer["failure"])
    checked: dict[str, Any] = answer["checked"]
    return checked


def check_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """What Ray Train runs on each worker. A failure is returned: Ray would try it again."""
    config = RunConfig.model_validate_json(loop_config["config"])
    try:
        found = preflight(config, lambda _: None, preparer_of(config))
    except MomeError as error:
        return {"failure": as_told(error)}
    return {"checked": {each.what: {"told": each.told, "seconds": each.seconds} for each in found}}
