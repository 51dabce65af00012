"""The DeepSpeed engine: its config, its C++ extensions, a stage's model under ZeRO 0-3, its fragments (contract C5)."""

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
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.cpp_extension import get_default_build_root

from pipeline.config.errors import ConfigError
from pipeline.config.schema import EngineConfig
from pipeline.data.order import share
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import Model
from pipeline.planning.estimate import FLOAT32, Sharding
from pipeline.training.checkpoint.serialization import SavedState
from pipeline.training.collectives import Collectives
from pipeline.training.engine import Fragment, parameter_groups
from pipeline.training.stages import Stage

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
AVERAGE = "ema"  # moving average of a weight, if the stage keeps one
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
        element=2 if stage.run.engine.precision == "bfloat16" else FLOAT32,
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
    for block in [module for module in model.modules() if isinstance(module, model.BLOCK)]:
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
    """Hold the node's lock for building extensions in `folder`; ConfigError if the folder is not writable.

    torch's own guard, a file, outlives a killed process and blocks later runs; the holder of this lock may delete it.
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


class DeepSpeedEngine:
    """One stage's engine. Parameters that the stage does not train must be frozen before it is built (contract C3)."""

    def __init__(self, model: Model, stage: Stage, collectives: Collectives):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        load_extensions()
        deepspeed.init_distributed(dist_backend="gloo" if collectives.device.type == "cpu" else "nccl", verbose=False)
        settings, optimizer = stage.run.engine, stage.config.optimizer
        self._collectives = collectives
        self._zero_stage, self._offloads = settings.zero_stage, settings.offload_optimizer
        self._parameters = dict(model.named_parameters())
        prepare_blocks(model, settings)
        # DeepSpeed creates the master weights from rounded values: keep the exact ones.
        start = {n: p.detach().clone() for n, p in self._parameters.items()} if settings.precision != "float32" else {}
        on_cuda = collectives.device.type == "cuda"
        groups = parameter_groups(model, optimizer, stage.run.reproduce_vlmo_release)
        self.adam = torch.optim.AdamW(groups, optimizer.lr, optimizer.betas, optimizer.eps, fused=on_cuda)
        config, model = deepspeed_config(stage, collectives.world_size), model.to(collectives.device)
        self.deepspeed: Any = deepspeed.initialize(model=model, optimizer=self.adam, config=config)[0]
        self.reader: nn.Module = self.deepspeed  # for inference; at ZeRO 3 its forward is a collective call
        self.module: nn.Module = self.deepspeed.module
        self.gradient_norm: Tensor | float = 0.0  # of the last step over all parameters, before clipping
        # The tensors that Adam steps: whole parameters, or this rank's flat float32 partitions.
        self._optimized: list[Tensor] = [tensor for group in self.adam.param_groups for tensor in group["params"]]
        if self._zero_stage == 3:
            self._optimized = list(self.deepspeed.optimizer.fp32_partitioned_groups_flat)
        # DeepSpeed creates Adam's state lazily, and restored moments would have no place: create it now.
        for tensor in self._optimized:
            step = torch.zeros((), dtype=torch.float32, device=tensor.device if on_cuda else "cpu")
            moments = {moment: torch.zeros_like(tensor, dtype=torch.float32) for moment in MOMENTS}
            self.adam.state[tensor] |= {"step": step, **moments}
        if link := getattr(self.deepspeed.optimizer, "_lazy_init_hp_params_optimizer_state", None):
            link()
        self._steps, self._decay = 0, optimizer.ema_decay
        self._exact: dict[str, Tensor] = {}  # this rank's range of the frozen weights, which have no master weights
        self.averages: dict[str, Tensor] = {}  # moving average of this rank's range of every trained master weight
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                begin, end = self._range(name)
                if name in start:
                    own = start[name].view(-1)[begin:end]
                    if not parameter.requires_grad:
                        self._exact[name] = own.float().cpu()
                    elif begin < end:
                        self._local(name, "weight").copy_(own)
                if self._decay is not None and parameter.requires_grad and begin < end:
                    self.averages[name] = self._local(name, "weight").float().clone()

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        return self.deepspeed(passes)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)
        if last and self._offloads and self._zero_stage >= 2 and self.deepspeed.gradient_accumulation_steps() > 1:
            # Otherwise a parameter that the last micro-batch does not use loses the gradient of the earlier ones.
            self.deepspeed.optimizer.finalize_gradient_accumulation_boundary()

    def step(self, rate: float) -> None:
        """Update the weights at this learning rate, times the multiplier of their parameter group."""
        optimizer = self.deepspeed.optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        norm = None
        if optimizer is self.adam:  # at stage 0 plain AdamW does not keep the norm
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        self.deepspeed.step()
        self.gradient_norm = self.deepspeed.get_global_grad_norm() if norm is None else norm

        # Zero the gradient buffers that outlive a step: DeepSpeed writes a gradient only where a parameter was used, so
        # an expert that a step leaves idle would get its last one again (0.19.8). The attributes are not documented.
        buffers: list[Tensor] = []
        if self._zero_stage == 3:
            buffers = [optimizer.grad_partitions_flat_buffer]
            if self._offloads:
                buffers += [group.grad for group in optimizer.fp32_partitioned_groups_flat]
        elif self._offloads:
            buffers = [group.grad for group in optimizer.single_partition_of_fp32_groups]
            buffers += optimizer.accumulated_grads_in_cpu.values()
        for buffer in buffers:
            buffer.zero_()

        self._steps += 1
        if self._decay is not None:
            keep = min(self._decay, (1 + self._steps) / (10 + self._steps))
            with torch.no_grad():
                for name, average in self.averages.items():
                    average.lerp_(self._local(name, "weight").float(), 1 - keep)

    def local_gradients(self) -> list[Tensor]:
        """Return the gradients that the next step applies: at stages 1 to 3 this rank's reduced partition."""
        partitioned = getattr(self.deepspeed.optimizer, "averaged_gradients", None) or {}
        gradients = [tensor for group in partitioned.values() if group is not None for tensor in group]
        if not gradients:  # stage 0, or offloaded with the optimizer
            tensors = [*self._parameters.values(), *self._optimized]
            gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        return gradients

    def memory(self) -> dict[str, int]:
        """Return the bytes of this rank's parameters, gradients, and optimizer state with master weights."""
        held = [getattr(parameter, "ds_tensor", parameter) for parameter in self._parameters.values()]
        masters = [tensor for tensor in self._optimized if all(tensor is not parameter for parameter in held)]
        moments = [value for state in self.adam.state.values() for value in state.values() if torch.is_tensor(value)]
        optimizer = [*masters, *moments, *self.averages.values()]
        reduced = getattr(self.deepspeed.optimizer, "fp32_groups_gradients_flat", [])  # of bfloat16 at stage 1
        categories = {"parameters": held, "gradients": [*self.local_gradients(), *reduced], "optimizer": optimizer}
        return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in categories.items()}

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's part of every parameter; the ranks' fragments tile each parameter exactly."""
        for name, parameter in self._parameters.items():
            start, stop = self._range(name)
            if start < stop:
                values = {kind: self._local(name, kind) for kind in (KINDS if parameter.requires_grad else KINDS[:1])}
                if name in self.averages:
                    values[AVERAGE] = self.averages[name]
                yield Fragment(name, start, values)

    def restore(self, source: SavedState) -> None:
        """Restore weights, master weights and moments saved at any world size and ZeRO stage, bit for bit."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                start, stop = self._range(name)
                if start < stop:
                    for kind in KINDS if parameter.requires_grad else KINDS[:1]:
                        self._local(name, kind).copy_(source.read(name, kind, start, stop))
                if name in self.averages:  # checkpoints without an average start it from the weight
                    kind = AVERAGE if (name, AVERAGE) in source.parts else "weight"
                    self.averages[name].copy_(source.read(name, kind, start, stop))
                # The weight that the forward uses: this rank's partition at stage 3, else the whole parameter.
                if self._zero_stage != 3:
                    parameter.data.view(-1).copy_(source.read(name, "weight", 0, parameter.numel()))
                elif start < stop:
                    partition = parameter.ds_tensor.data.view(-1)  # type: ignore[attr-defined]
                    partition[: stop - start].copy_(source.read(name, "weight", start, stop))
        for tensor in self._optimized:
            self.adam.state[tensor]["step"].fill_(float(source.optimizer_step))
        self._steps = source.optimizer_step

    def weights(self) -> dict[str, Tensor] | None:
        """Gather the full float32 weights, or their moving average, on rank 0. A collective call."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        gathered: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            is_trained = parameter.requires_grad
            if (self._decay is not None and is_trained) or name in self._exact:
                # The ranks' ranges, assembled by a sum in which each rank is zero outside its own.
                numel = getattr(parameter, "ds_numel", parameter.numel())
                full = torch.zeros(numel, device=self._collectives.device)
                own = self.averages.get(name) if is_trained else self._exact[name]
                if own is not None:
                    full[slice(*self._range(name))] = own
                full = self._collectives.sum(full)
            elif self._zero_stage == 3 and not is_trained:
                with GatheredParameters([parameter]):
                    full = parameter.data.clone()
            else:
                master = safe_get_full_fp32_param(parameter) if is_trained else None
                full = parameter.data if master is None else master
            if self._collectives.rank == 0:
                whole = full.detach().float().cpu().clone()
                gathered[name] = whole.view(getattr(parameter, "ds_shape", parameter.shape))
        return gathered if self._collectives.rank == 0 else None

    def _range(self, name: str) -> tuple[int, int]:
        """Return the range of a flattened parameter that this rank saves and restores."""
        parameter: Any = self._parameters[name]
        numel: int = getattr(parameter, "ds_numel", parameter.numel())  # at ZeRO 3 the parameter itself is empty
        rank = self._collectives.rank
        if self._zero_stage == 3:
            size = parameter.ds_tensor.numel()
            return min(rank * size, numel), min((rank + 1) * size, numel)
        if parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
            if parameter._hp_mapping is None:
                return 0, 0
            address = parameter._hp_mapping.lp_fragment_address
            return address.start, address.start + address.numel
        return share(numel, rank, self._collectives.world_size)

    def _local(self, name: str, kind: str) -> Tensor:
        """Return a writable view of the float32 master weight or moment in this rank's range."""
        parameter: Any = self._parameters[name]
        start, stop = self._range(name)
        moment = None if kind == "weight" else kind
        if name in self._exact:
            return self._exact[name]
        if self._zero_stage == 3:
            if not parameter.requires_grad:
                return parameter.ds_tensor.data.view(-1)[: stop - start]
            state, _ = self.deepspeed.optimizer._get_fp32_opt_state_partition(parameter, False, moment)
            return state.data[: stop - start]
        if parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
            return parameter._hp_mapping.get_hp_fragment(moment).data
        full = parameter.data if moment is None else self.adam.state[parameter][moment]
        return full.view(-1)[start:stop]

    def close(self) -> None:
        """Free the engine, so that the next stage can build its own."""
        self.deepspeed.destroy()
