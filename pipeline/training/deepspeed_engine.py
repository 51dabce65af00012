"""The DeepSpeed engine: a stage's model under ZeRO 0-3, and its state as named fragments (contract C5)."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.order import share
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import Model
from pipeline.training.checkpoint.serialization import SavedState
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_setup import deepspeed_config, load_extensions, prepare_blocks
from pipeline.training.engine import Fragment, parameter_groups
from pipeline.training.stages import Stage

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
AVERAGE = "ema"  # moving average of a weight, if the stage keeps one


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
        self.deepspeed: Any
        config = deepspeed_config(stage, collectives.world_size)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model.to(collectives.device), optimizer=self.adam, config=config
        )
        self.reader: nn.Module = self.deepspeed  # for inference; at ZeRO 3 its forward is a collective call
        self.module: nn.Module = self.deepspeed.module
        self._plain_norm: Tensor | None = None
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
        """Add this micro-batch's gradient; `last` marks the last one before `step`."""
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
        if optimizer is self.adam:  # at stage 0 plain AdamW does not keep the norm
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            self._plain_norm = nn.utils.get_total_norm(gradients)
        self.deepspeed.step()

        # Zero the gradient buffers that outlive a step: DeepSpeed writes a gradient only where a parameter was used, so
        # an expert that a step leaves idle would get its last gradient again (DeepSpeed 0.19.8). These attributes are
        # not documented; a release without them fails here by name.
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

    def gradient_norm(self) -> float:
        """Return the 2-norm of the last step's gradient over all parameters, before clipping."""
        norm = self.deepspeed.get_global_grad_norm() if self._plain_norm is None else self._plain_norm
        assert norm is not None, "called before the first step"
        return float(norm)

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
                    kind = AVERAGE if source.holds(name, AVERAGE) else "weight"
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
