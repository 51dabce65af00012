"""The DeepSpeed engine: ZeRO 0-3 behind the `Engine` protocol, and its state as named fragments (contract C5)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.config.schema import RunConfig, StageConfig
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import Model
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_setup import deepspeed_config, load_extensions, prepare_blocks
from pipeline.training.engine import Fragment, FragmentSource
from pipeline.training.optimizer import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
AVERAGE = "ema"  # moving average of a weight, if the stage keeps one


class DeepSpeedEngine:
    """One stage's model under ZeRO.

    Parameters that the stage does not train must be frozen before the engine is built (contract C3). Adam's state is
    created before the first step; DeepSpeed creates it lazily, and restored moments would have no place.
    """

    def __init__(self, model: Model, config: RunConfig, stage: StageConfig, collectives: Collectives):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        load_extensions()
        deepspeed.init_distributed(dist_backend="gloo" if collectives.device.type == "cpu" else "nccl", verbose=False)
        self._deepspeed = deepspeed
        self._collectives = collectives
        self._zero_stage = config.engine.zero_stage
        self._names = dict(model.named_parameters())
        self._exact: dict[str, Tensor] = {}  # float32 values of frozen weights that the engine holds in bfloat16
        prepare_blocks(model, config.engine)
        rounds = config.engine.precision != "float32"
        start = {n: p.detach().clone() for n, p in self._names.items()} if rounds else {}
        optimizer = torch.optim.AdamW(
            parameter_groups(model, stage.optimizer, config.reproduce_vlmo_release),
            lr=stage.optimizer.lr,
            betas=stage.optimizer.betas,
            eps=stage.optimizer.eps,
            fused=collectives.device.type == "cuda",
        )
        self._engine, *_ = deepspeed.initialize(
            model=model.to(collectives.device),
            optimizer=optimizer,
            config=deepspeed_config(config, stage, collectives.world_size),
        )
        self._adam = optimizer
        self._offloads = config.engine.offload_optimizer
        self._accumulates = self._engine.gradient_accumulation_steps() > 1
        self._plain_norm: Tensor | None = None
        self._prime()
        self._exact = self._start_from(start)
        self._steps = 0
        self._decay = stage.optimizer.ema_decay
        self._averages = self._own_weights() if self._decay is not None else {}

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        return self._engine(passes)

    @property
    def reader(self) -> nn.Module:
        """The module for inference. At ZeRO 3 it gathers the weights, so its forward is a collective call."""
        return self._engine

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)
        if last and self._offloads and self._zero_stage >= 2 and self._accumulates:
            # Otherwise a parameter that the last micro-batch does not use loses the gradient of the earlier ones.
            self._engine.optimizer.finalize_gradient_accumulation_boundary()

    def step(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        if self._engine.optimizer is self._adam:  # at stage 0 plain AdamW does not keep the norm
            gradients = [p.grad for p in self._names.values() if p.grad is not None]
            self._plain_norm = nn.utils.get_total_norm(gradients)
        self._engine.step()
        self._clear_gradient_buffers()
        self._steps += 1
        if self._decay is not None:
            keep = min(self._decay, (1 + self._steps) / (10 + self._steps))
            with torch.no_grad():
                for name, average in self._averages.items():
                    weight = self._local(name, "weight", *self._range(self._names[name]))
                    average.lerp_(weight.float(), 1 - keep)

    def _clear_gradient_buffers(self) -> None:
        """Zero the gradient buffers that outlive a step.

        DeepSpeed writes a gradient only where a parameter was used, so an expert that a step leaves idle would
        otherwise get its last gradient again (DeepSpeed 0.19.8; found by the project's probes). This uses attributes
        that DeepSpeed does not document; a release without them fails here by name.
        """
        optimizer = self._engine.optimizer
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

    def _own_weights(self) -> dict[str, Tensor]:
        """Copy this rank's range of every trained master weight, as the start of the moving average."""
        ranges = {n: (p, *self._range(p)) for n, p in self._names.items() if p.requires_grad}
        return {
            name: self._local(name, "weight", start, stop).float().clone()
            for name, (parameter, start, stop) in ranges.items()
            if start < stop
        }

    def gradient_norm(self) -> float:
        """Return the 2-norm of the last step's gradient over all parameters, before clipping."""
        norm = self._engine.get_global_grad_norm() if self._plain_norm is None else self._plain_norm
        assert norm is not None, "called before the first step"
        return float(norm)

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {
            name: safe_get_full_grad(parameter).detach().float().clone()
            for name, parameter in self._names.items()
            if parameter.requires_grad
        }

    def local_gradients(self) -> list[Tensor]:
        """Return the gradients that the next step applies: at stages 1 to 3 this rank's reduced partition."""
        partitioned = getattr(self._engine.optimizer, "averaged_gradients", None) or {}
        gradients = [tensor for group in partitioned.values() if group is not None for tensor in group]
        if not gradients:  # stage 0, or offloaded with the optimizer
            tensors = [*self._names.values(), *self._optimized_tensors()]
            gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        return gradients

    def memory(self) -> dict[str, int]:
        """Return the bytes of this rank's parameters, gradients, and optimizer state with master weights."""
        held = [getattr(parameter, "ds_tensor", parameter) for parameter in self._names.values()]
        masters = [tensor for tensor in self._optimized_tensors() if all(tensor is not parameter for parameter in held)]
        moments = [value for state in self._adam.state.values() for value in state.values() if torch.is_tensor(value)]
        categories = {
            "parameters": held,
            "gradients": self.local_gradients(),
            "optimizer": [*masters, *moments, *self._averages.values()],
        }
        return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in categories.items()}

    def _prime(self) -> None:
        """Create zeroed Adam state for every optimized tensor."""
        for tensor in self._optimized_tensors():
            state = self._adam.state[tensor]
            is_fused = self._collectives.device.type == "cuda"
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if is_fused else "cpu")
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(tensor, dtype=torch.float32)
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _start_from(self, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy the float32 starting weights into the master weights, which DeepSpeed creates from rounded values.

        Return this rank's ranges of the frozen weights: they have no masters, and are handed over unrounded.
        """
        exact = {}
        with torch.no_grad():
            for name, weight in start.items():
                parameter = self._names[name]
                begin, end = self._range(parameter)
                own = weight.view(-1)[begin:end]
                if not parameter.requires_grad:
                    exact[name] = own.float().cpu()
                elif begin < end:
                    self._local(name, "weight", begin, end).copy_(own)
        return exact

    def _optimized_tensors(self) -> list[Tensor]:
        """Return the tensors Adam steps: whole parameters, or this rank's flat float32 partitions."""
        if self._zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._adam.param_groups for tensor in group["params"]]

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's part of every parameter; the ranks' fragments tile each parameter exactly."""
        for name, parameter in self._names.items():
            start, stop = self._range(parameter)
            if start < stop:
                kinds = KINDS if parameter.requires_grad else KINDS[:1]
                values = {kind: self._local(name, kind, start, stop) for kind in kinds}
                if name in self._averages:
                    values[AVERAGE] = self._averages[name]
                yield Fragment(name, start, values)

    def _numel(self, parameter: nn.Parameter) -> int:
        return parameter.ds_numel if self._zero_stage == 3 else parameter.numel()  # type: ignore[attr-defined]

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return the range of a flattened parameter that this rank saves and restores."""
        numel, rank = self._numel(parameter), self._collectives.rank
        if self._zero_stage == 3:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            return min(rank * size, numel), min((rank + 1) * size, numel)
        if parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is None:
                return 0, 0
            address = mapping.lp_fragment_address
            return address.start, address.start + address.numel
        world_size = self._collectives.world_size
        return rank * numel // world_size, (rank + 1) * numel // world_size

    def _local(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Return a writable view of the float32 master weight or moment in this rank's range."""
        parameter = self._names[name]
        moment = None if kind == "weight" else kind
        if name in self._exact:
            return self._exact[name]
        if self._zero_stage == 3:
            if not parameter.requires_grad:
                return parameter.ds_tensor.data.view(-1)[: stop - start]  # type: ignore[attr-defined]
            state, _ = self._engine.optimizer._get_fp32_opt_state_partition(parameter, False, moment)
            return state.data[: stop - start]
        if parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
            return parameter._hp_mapping.get_hp_fragment(moment).data
        full = parameter.data if moment is None else self._adam.state[parameter][moment]
        return full.view(-1)[start:stop]

    def restore(self, source: FragmentSource) -> None:
        """Restore weights, master weights and moments saved at any world size and ZeRO stage, bit for bit."""
        with torch.no_grad():
            for name, parameter in self._names.items():
                start, stop = self._range(parameter)
                if start < stop:
                    for kind in KINDS if parameter.requires_grad else KINDS[:1]:
                        self._local(name, kind, start, stop).copy_(source.read(name, kind, start, stop))
                if name in self._averages:  # checkpoints without an average start it from the weight
                    kind = AVERAGE if source.holds(name, AVERAGE) else "weight"
                    self._averages[name].copy_(source.read(name, kind, start, stop))
                self._write_weight(name, parameter, source)
        for tensor in self._optimized_tensors():
            self._adam.state[tensor]["step"].fill_(float(source.optimizer_step))
        self._steps = source.optimizer_step

    def _write_weight(self, name: str, parameter: nn.Parameter, source: FragmentSource) -> None:
        """Restore the weight used by the forward: this rank's partition at stage 3, else the whole parameter."""
        if self._zero_stage == 3:
            start, stop = self._range(parameter)
            if start < stop:
                shard = parameter.ds_tensor.data.view(-1)[: stop - start]  # type: ignore[attr-defined]
                shard.copy_(source.read(name, "weight", start, stop))
        else:
            parameter.data.view(-1).copy_(source.read(name, "weight", 0, parameter.numel()))

    def weights(self) -> dict[str, Tensor] | None:
        from deepspeed.utils import safe_get_full_fp32_param

        gathered: dict[str, Tensor] = {}
        for name, parameter in self._names.items():
            if self._decay is not None and parameter.requires_grad:
                full = self._whole(parameter, self._averages.get(name))
            elif name in self._exact:
                full = self._whole(parameter, self._exact[name])
            elif self._zero_stage == 3 and not parameter.requires_grad:
                with self._deepspeed.zero.GatheredParameters([parameter]):
                    full = parameter.data.clone()
            else:
                master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
                full = parameter.data if master is None else master
            if self._collectives.rank == 0:
                gathered[name] = full.detach().float().cpu().clone().view(self._shape(parameter))
        return gathered if self._collectives.rank == 0 else None

    def _whole(self, parameter: nn.Parameter, own: Tensor | None) -> Tensor:
        """Assemble a parameter from the ranks' ranges, by a sum in which each rank is zero outside its own."""
        full = torch.zeros(self._numel(parameter), device=self._collectives.device)
        if own is not None:
            start, stop = self._range(parameter)
            full[start:stop] = own
        return self._collectives.sum(full)

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape if self._zero_stage == 3 else parameter.shape  # type: ignore[attr-defined]

    def close(self) -> None:
        """Free the engine, so that the next stage can build its own."""
        self._engine.destroy()
