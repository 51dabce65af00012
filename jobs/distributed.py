"""Work that all ranks do once, outside of a training run: on Ray, under torchrun, or in this process alone.

torchrun --nproc-per-node N --no-python mome evaluate CHECKPOINT
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from jobs.cluster import connect, root_cause, run_on_ranks
from jobs.pretrain import for_ranks
from jobs.rank import error_from_json, error_json, loader_backend
from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.training.collectives import Collectives
from pipeline.training.preflight import preflight

Result = dict[str, Any]


def ranks_here() -> Ranks:
    """Return the process group that torchrun started this process in, or a single process."""
    return Collectives() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SINGLE_PROCESS


def device_of(ranks: Ranks) -> torch.device:
    """Return the device of this rank."""
    if isinstance(ranks, Collectives):
        return ranks.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    """Return the config with this number of ranks, validated."""
    values = config.model_dump(mode="json", exclude_unset=True)
    values["cluster"] = {**values.get("cluster", {}), "workers": workers, "min_workers": None}
    return validate(values, config.name)


def on_workers(
    work: Callable[[dict[str, str]], Result], config: RunConfig, workers: int, name: str, request: Mapping[str, Any]
) -> Result:
    """Run `work` on `workers` ranks placed by Ray and return rank 0's result; `run_request` reads `request` there.

    Lost ranks are restarted up to `cluster.max_failures` times. Raises as `run_on_cluster`.
    """
    import ray.train

    train: Any = ray.train  # Ray's annotations are those of Train v1

    job_name = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.name).strip("-._") or "weights"  # folders may have any name
    config = with_workers(config.model_copy(update={"name": job_name}), workers)
    cluster = config.cluster.model_copy(update={"loader_actors": 0})  # only training uses them
    config = config.model_copy(update={"cluster": cluster})
    budget = train.FailureConfig(max_failures=config.cluster.max_failures)
    return run_on_cluster(work, config, name, {"request": json.dumps(request)}, failure_config=budget)


def run_on_cluster(
    work: Callable[[dict[str, str]], Result],
    config: RunConfig,
    name: str,
    arguments: Mapping[str, str] | None = None,
    **run: Any,
) -> Result:
    """Run `work` on the run's ranks, as `run_on_ranks`. Raises MomeError with the first failure of any rank."""
    config = for_ranks(config)
    connect(config.cluster)
    try:
        result: Result = run_on_ranks(work, config, f"{config.name}-{name}", arguments, **run)
    except MomeError:
        raise
    except Exception as error:
        raise RunFailed(f"{name}: a rank was lost: {root_cause(error)}") from error
    if "failure" in result:
        raise error_from_json(result["failure"])
    return result


def run_request(loop_config: dict[str, str], work: Callable[[Any, Ranks], Result]) -> Result:
    """Run `work(request, ranks)` on a Ray Train worker. A failure is returned, because Ray would retry an exception."""
    try:
        return work(json.loads(loop_config["request"]), Collectives())
    except MomeError as error:
        return {"failure": error_json(error)}


def preflight_on_ray(config: RunConfig) -> Result:
    """Check the run on every rank; return details and seconds by check. Raises MomeError with the first failure."""
    checks: Result = run_on_cluster(check_rank, config, "preflight")["checked"]
    return checks


def check_rank(loop_config: dict[str, str]) -> Result:
    """Run the preflight checks on a Ray Train worker. A failure is returned, because Ray would retry an exception."""
    config = RunConfig.model_validate_json(loop_config["config"])
    try:
        checks = preflight(config, lambda _: None, loader_backend(config))
    except MomeError as error:
        return {"failure": error_json(error)}
    return {"checked": {check.name: {"told": check.message, "seconds": check.seconds} for check in checks}}
