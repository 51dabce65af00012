"""A run's settings as the memory estimate reads them: from the DeepSpeed JSON itself, so that the two cannot differ."""

from __future__ import annotations

from pipeline.config.schema import RunConfig, StageConfig
from pipeline.planning.memory import Sharding
from pipeline.training.deepspeed_config import deepspeed_config


def sharding_of(config: RunConfig, stage: StageConfig, world_size: int, on_cuda: bool) -> Sharding:
    """How the stage's state lies on `world_size` ranks."""
    settings = deepspeed_config(config, stage, world_size)
    zero = settings["zero_optimization"]
    return Sharding(
        zero_stage=zero["stage"],
        world_size=world_size,
        precision=config.engine.precision,
        reduce_bucket=zero["reduce_bucket_size"],
        allgather_bucket=zero["allgather_bucket_size"],
        max_live=zero["stage3_max_live_parameters"],
        offload_optimizer="offload_optimizer" in zero,
        offload_parameters="offload_param" in zero,
        averages=stage.optimizer.ema_decay is not None,
        accumulates=settings["gradient_accumulation_steps"] > 1,
        fused_update=on_cuda,
    )
