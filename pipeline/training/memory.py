"""What a rank holds in memory, told when it ran out of it: a restart would only run out again."""

from __future__ import annotations

import errno

import torch

from pipeline.config.errors import RunFailed
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.training.collectives import Collectives
from pipeline.training.steps import accumulation

# What allocators say that raise a plain RuntimeError, or one of a library of the accelerator.
SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the host, whoever says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in SAID)


def out_of_memory(
    error: BaseException, config: RunConfig, stage: StageConfig, collectives: Collectives, held: dict[str, int] | None
) -> RunFailed:
    """What to raise for it. `held`: bytes of this rank's state by category; None while the engine was being built."""
    engine, world_size = config.engine, collectives.world_size
    share = -(-stage.global_batch_size // world_size)
    rows = -(-share // accumulation(stage.global_batch_size, world_size, engine.micro_batch_size))
    lines = [f"stage {stage.name}, rank {collectives.rank} of {world_size}: out of memory: {_first_line(error)}"]
    if held is None:
        lines.append("It happened before the first step: the model and its optimizer's state do not fit.")
    else:
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in held.items())
        lines.append(f"This rank's state at engine.zero_stage {engine.zero_stage}: {parts}; {_device(collectives)}")
    lines.append(
        f"One pass held {rows} of {share} rows (engine.micro_batch_size: {engine.micro_batch_size or 'not set'}); "
        "what is not state above is activations."
    )
    lines.append("A restart would repeat it. Change, in this order: " + "; ".join(_remedies(config, rows)))
    return RunFailed("\n".join(lines))


def _remedies(config: RunConfig, rows: int) -> list[str]:
    """Those that are still to be had."""
    engine, found = config.engine, []
    if rows > 1:
        found.append(f"engine.micro_batch_size={max(rows // 2, 1)} (fewer activations; the gradient stays the same)")
    if not engine.activation_checkpointing:
        found.append("engine.activation_checkpointing=true (activations are computed twice, and not kept)")
    if engine.zero_stage < 3:
        found.append(f"engine.zero_stage={engine.zero_stage + 1} (ranks share more of the state)")
    if not engine.offload_optimizer and engine.zero_stage:  # without ZeRO nothing is offloaded
        found.append("engine.offload_optimizer=true (moments in the host's memory)")
    if engine.precision == "float32":
        found.append("engine.precision=bfloat16 (in a new run: it stays as it is within one)")
    return [*found, "more ranks (cluster.workers)"]


def _device(collectives: Collectives) -> str:
    if collectives.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(collectives.device)
        peak = torch.cuda.max_memory_allocated(collectives.device)
        return f"the device holds {_bytes(total)}, {_bytes(free)} of it free; at most {_bytes(peak)} were in use"
    return "in the host's memory"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
