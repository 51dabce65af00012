"""DeepSpeed's config, the transformer blocks' compilation and checkpointing, and DeepSpeed's C++ extensions."""

import fcntl
import hashlib
import importlib.util
import io
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.cpp_extension import get_default_build_root

from pipeline.config.errors import ConfigError
from pipeline.config.schema import EngineConfig
from pipeline.models.model import Model
from pipeline.planning.estimate import Sharding
from pipeline.training.stages import Stage

log = logging.getLogger(__name__)

COMPILED_VARIANTS = 1024  # of one block's code: layers x routes x forwards with and without gradient
FOLDER = "TORCH_EXTENSIONS_DIR"  # torch's own variable; a folder that the user sets is used as it is


def deepspeed_config(stage: Stage, world_size: int) -> dict[str, Any]:
    """Return a stage's DeepSpeed JSON, every setting explicit; the step itself splits the rows (contract C2)."""
    engine = stage.run.engine
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    offload = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    steps = stage.num_micro_batches(world_size)
    return {
        "train_batch_size": world_size * steps,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": stage.config.optimizer.max_grad_norm,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the host too: nothing is compiled for it
        "prescale_gradients": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": engine.precision == "bfloat16", "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            **{key: host for key, is_offloaded in offload.items() if is_offloaded},
        },
    }


def sharding_of(stage: Stage, world_size: int, on_cuda: bool) -> Sharding:
    """Return the stage's sharding for the memory estimate, read from the DeepSpeed JSON so that the two agree."""
    settings = deepspeed_config(stage, world_size)
    zero = settings["zero_optimization"]
    return Sharding(
        zero_stage=zero["stage"],
        world_size=world_size,
        precision=stage.run.engine.precision,
        reduce_bucket=zero["reduce_bucket_size"],
        max_live=zero["stage3_max_live_parameters"],
        offload_optimizer="offload_optimizer" in zero,
        offload_parameters="offload_param" in zero,
        averages=stage.config.optimizer.ema_decay is not None,
        fused_update=on_cuda,
    )


def prepare_blocks(model: Model, engine: EngineConfig) -> None:
    """Compile the model's transformer blocks or checkpoint their activations, before DeepSpeed gets the model.

    A recomputed block drops the same: drop path is an input, and for dropout the generator's state is preserved.
    """
    if engine.compile:
        # Beyond torch's limits a variant would silently run uncompiled; each layer's drop path alone makes one.
        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
        torch._dynamo.config.accumulated_recompile_limit = COMPILED_VARIANTS
    block: Any
    for block in model.transformer_blocks():
        if engine.compile:
            block.forward = torch.compile(block.forward)
        if engine.activation_checkpointing:
            early_stop = engine.zero_stage != 3  # a module's weights are released when the module ends
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, early_stop=early_stop)


def load_extensions() -> None:
    """Load, and build the first time, the extension that DeepSpeed would otherwise load itself."""
    from deepspeed.comm.torch import build_shm_op

    with exclusive_build(use_own_folder()), redirect_stdout(io.StringIO()):  # suppresses a build message
        build_shm_op()


def use_own_folder() -> Path:
    """Put this installation's ninja first in PATH, and return torch's build folder, set to one of this installation."""
    scripts = sysconfig.get_path("scripts")
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if Path(scripts, "ninja").exists() and paths[0] != scripts:
        os.environ["PATH"] = os.pathsep.join([scripts, *paths])
    spec = importlib.util.find_spec("deepspeed")
    installation = hashlib.sha256(str(spec and spec.origin).encode()).hexdigest()[:8]
    version = f"mome-py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}-{installation}"
    return Path(os.environ.setdefault(FOLDER, str(Path(get_default_build_root()) / version)))


@contextmanager
def exclusive_build(folder: Path) -> Iterator[None]:
    """Hold the node's lock for building or loading extensions in `folder`.

    torch guards a build by a file that outlives a killed process, and later runs wait for it forever. The kernel
    releases this lock, so that its holder may delete torch's file. Raises ConfigError if the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "mome.lock").open("a")
    except OSError as error:
        raise ConfigError(
            f"DeepSpeed's operators cannot be built in {folder} ({error.strerror}); set {FOLDER} to a writable folder "
            "on a file system that permits execution"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s); do not start two first runs at once", folder, error.strerror)
        else:
            for stale in folder.glob("*/lock"):
                stale.unlink(missing_ok=True)
        yield
