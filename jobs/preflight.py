"""`mome train --preflight` on Ray: the ranks are placed as a run's are, each checks, and nobody trains."""

from __future__ import annotations

import os
import secrets
import tempfile
from typing import Any

from jobs.cluster import connect, scaling_of
from jobs.pretrain import for_ranks
from pipeline.config.errors import MomeError, RunFailed
from pipeline.config.schema import RunConfig
from pipeline.data.loading.loader import local_preparer
from pipeline.training.preflight import preflight


def preflight_on_ray(config: RunConfig) -> dict[str, Any]:
    """What was checked, with seconds, by its name. Raises MomeError with the first failure, on whichever rank."""
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = for_ranks(config)
    connect(config.cluster)
    cluster = config.cluster
    trainer = TorchTrainer(
        check_rank,  # type: ignore[arg-type]  # its answer is what Result.return_value holds
        train_loop_config={"config": config.model_dump_json()},
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=scaling_of(cluster),
        run_config=RayRunConfig(
            name=f"{config.name}-preflight-{secrets.token_hex(4)}",
            storage_path=os.path.join(tempfile.gettempdir(), "mome-ray-train"),
        ),
    )
    try:
        answer: Any = trainer.fit().return_value  # type: ignore[attr-defined]
    except Exception as error:
        raise RunFailed(f"preflight: a rank was lost: {str(error).strip().splitlines()[-1]}") from error
    if "error" in answer:
        failure = RunFailed(answer["error"])
        failure.exit_status = answer["exit_status"]
        raise failure
    return answer


def check_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """What Ray Train runs on each worker. A failure is returned: Ray would try it again."""
    config = RunConfig.model_validate_json(loop_config["config"])
    factory = local_preparer
    if config.cluster.loader_actors:
        from jobs.loader_actors import ActorPreparer

        factory = ActorPreparer  # type: ignore[assignment]
    try:
        found = preflight(config, lambda _: None, factory)
    except MomeError as error:
        return {"error": str(error), "exit_status": error.exit_status}
    return {each.what: {"told": each.told, "seconds": each.seconds} for each in found}
