"""Work that ranks do once, beside any run: on Ray, under torchrun, or in this process alone.

torchrun --nproc-per-node N --no-python mome evaluate CHECKPOINT
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from jobs.cluster import connect, first_words, on_ranks
from jobs.plan import with_workers
from jobs.pretrain import for_ranks
from jobs.rank import as_error, as_told
from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.schema import RunConfig
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.training.collectives import Collectives

Answer = dict[str, Any]


def ranks_here() -> Ranks:
    """Those that torchrun started this process among, or this process alone."""
    return Collectives() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SINGLE_PROCESS


def device_of(ranks: Ranks) -> torch.device:
    if isinstance(ranks, Collectives):
        return ranks.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_workers(
    work: Callable[[dict[str, str]], Answer], config: RunConfig, workers: int, name: str, asked: Mapping[str, Any]
) -> Answer:
    """`work` on so many ranks that Ray places as the run's, and what it gave on the first; `answered` reads `asked`.

    Ranks that are lost are placed anew, as often as `cluster.max_failures` says. Raises as `answer_of`.
    """
    import ray.train

    train: Any = ray.train  # its types are those of the version before

    name_of_job = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.name).strip("-._") or "weights"  # a folder may have any name
    config = with_workers(config.model_copy(update={"name": name_of_job}), workers)
    cluster = config.cluster.model_copy(update={"loader_actors": 0})  # they serve training alone
    config = config.model_copy(update={"cluster": cluster})
    budget = train.FailureConfig(max_failures=config.cluster.max_failures)
    return answer_of(work, config, name, {"asked": json.dumps(asked)}, failure_config=budget)


def answer_of(
    work: Callable[[dict[str, str]], Answer],
    config: RunConfig,
    name: str,
    given: Mapping[str, str] | None = None,
    **run: Any,
) -> Answer:
    """`work` on the run's ranks, as `on_ranks` has it done. Raises MomeError with the first failure, on any rank."""
    config = for_ranks(config)
    connect(config.cluster)
    try:
        answer: Answer = on_ranks(work, config, f"{config.name}-{name}", given, **run)
    except MomeError:
        raise
    except Exception as error:
        raise RunFailed(f"{name}: a rank was lost: {first_words(error)}") from error
    if "failure" in answer:
        raise as_error(answer["failure"])
    return answer


def answered(loop_config: dict[str, str], work: Callable[[Any, Ranks], Answer]) -> Answer:
    """`work(asked, ranks)` on a worker. A failure is returned: Ray would try it again."""
    try:
        return work(json.loads(loop_config["asked"]), Collectives())
    except MomeError as error:
        return {"failure": as_told(error)}
