"""The DeepSpeed JSON of a stage, computed from the run's config: every knob written out, for its defaults change."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config.schema import EngineConfig, RunConfig, StageConfig
from pipeline.training.steps import accumulation


def deepspeed_config(config: RunConfig, stage: StageConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a stage. Micro-batch size is nominal: rows are ours to cut (contract C2)."""
    steps = accumulation(stage.global_batch_size, world_size, config.engine.micro_batch_size)
    return {
        "train_batch_size": world_size * steps,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": stage.optimizer.max_grad_norm,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the host too: nothing is compiled for it
        "prescale_gradients": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": config.engine.precision == "bfloat16", "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            **_offload(config.engine),
        },
    }


def _offload(engine: EngineConfig) -> dict[str, Any]:
    """What lives in host memory; pinned where there is a device to copy to."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    offloaded = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    return {key: host for key, wanted in offloaded.items() if wanted}
