"""Health of a training step: non-finite values, loss spikes, diverging ranks, and exhausted memory.

Before an update, all ranks must agree on anything that changes what they do next, or some would wait forever. One
reduction before the update carries all of it, every `guards.health_check_every` steps.
"""

import errno
import hashlib
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.config.errors import RunFailed
from pipeline.config.schema import SpikeConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import NoSpace
from pipeline.training.callbacks import Callback
from pipeline.training.collectives import Collectives
from pipeline.training.stages import Stage


@dataclass(frozen=True)
class StepHealth:
    """State of a step before its update, the same on every rank."""

    losses: dict[str, float]  # of the global batch: `loss` and each objective's
    is_finite: bool  # all losses and gradients of all ranks
    preempted: bool  # on any rank


def check_step_health(
    losses: dict[str, Tensor], gradients: Iterable[Tensor], preempted: bool, collectives: Collectives
) -> StepHealth:
    """Reduce this rank's losses (0-d), the gradients that the update reads, and its condition. A collective call."""
    parts = torch.stack([loss.float() for loss in losses.values()])
    gradients = list(gradients)
    norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(())]
    norm = torch.stack([norm.float() for norm in norms]).sum().to(parts.device)
    is_bad = ~(parts.isfinite().all() & norm.isfinite())  # an overflowing norm too: the update divides by it
    flags = torch.stack([is_bad, torch.tensor(preempted, device=parts.device)])
    *totals, num_bad, num_preempted = collectives.sum(torch.cat([parts, flags.float()])).tolist()
    return StepHealth(dict(zip(losses, totals, strict=True)), num_bad == 0, num_preempted > 0)


def locate_non_finite(
    losses: dict[str, Tensor], model: nn.Module, repeat: Callable[[], object], collectives: Collectives
) -> str:
    """Describe which losses are not finite and in which module and rank it began. A collective call.

    `repeat` runs the step again: sums and reduced gradients hide their source. Gradients are unusable afterwards.
    """
    num_executed: Counter[str] = Counter()
    first: dict[str, tuple[int, str, str]] = {}  # direction -> the first module that is not finite, and its cause

    def after_forward(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        num_executed["forward"] += 1
        for leaf in tree_leaves(output):
            if (fault := _non_finite(leaf)) and "forward" not in first:
                cause = f"its output has {fault}"
                parameters = ((n, _non_finite(parameter)) for n, parameter in module.named_parameters())
                if bad := next(((n, parameter_fault) for n, parameter_fault in parameters if parameter_fault), None):
                    cause += f", its parameter '{bad[0]}' has {bad[1]}"
                elif any(_non_finite(value) for value in tree_leaves(inputs)):
                    cause += ", and its input is not finite either"
                else:
                    cause += "; its inputs and parameters are finite"
                first["forward"] = num_executed["forward"], name, cause
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(after_backward, name))

    def after_backward(name: str, gradient: Tensor) -> None:
        num_executed["backward"] += 1
        if (fault := _non_finite(gradient)) and "backward" not in first:
            first["backward"] = num_executed["backward"], name, f"the gradient of its output has {fault}"

    own = {name: loss.item() for name, loss in losses.items() if _non_finite(loss)}
    bad_losses = ", ".join(
        f"'{name}' is {value} on rank {rank}"
        for rank, values in enumerate(collectives.gather_objects(own))
        for name, value in values.items()
    )
    symptom = bad_losses or "the gradient is not finite, though the losses are"
    hooks = [m.register_forward_hook(partial(after_forward, name)) for name, m in model.named_modules() if name]
    try:
        repeat()
    finally:
        for hook in hooks:
            hook.remove()
    gathered = collectives.gather_objects(first)
    for direction in ("forward", "backward"):
        if on_ranks := [(*origins[direction], rank) for rank, origins in enumerate(gathered) if direction in origins]:
            _, module, cause, rank = min(on_ranks, key=lambda origin: (origin[0], origin[3]))
            return f"{symptom}; first in module '{module}' on rank {rank}, in the {direction} pass: {cause}"
    return f"{symptom}; all module outputs and gradients are finite when repeated: a sum over rows or ranks overflowed"


def _non_finite(value: object) -> str:
    """Describe a tensor's values that are not finite; empty if all are, or if it holds no floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return ""
    tensor = value.detach()
    count = int((~tensor.isfinite()).sum())
    return f"{'nan' if bool(tensor.isnan().any()) else 'inf'} ({count} of {tensor.numel()} values)" if count else ""


# ---- ranks that execute different modules (contract C3)

FIRST_STEPS = 3
FORWARD_END, BACKWARD_END = "(the end of the forward)", "(the end of the backward)"


@dataclass(eq=False)
class ExecutionOrderCheck(Callback):
    """Compares the order in which the ranks run the model's modules, in the first steps and then periodically.

    DeepSpeed computes silently wrong gradients when ranks run different modules in one step (`diverging_ranks` among
    the project's probes: 96 % error at ZeRO 2; at ZeRO 3 it mixes up weights, or hangs). The ranks therefore compare
    before any gradient is reduced, at the end of each forward; at ZeRO 3, whose forward gathers weights, before every
    module. Raises RunFailed on every rank, naming the first modules that differ. The hooks must be registered before
    the engine's. Recomputation in activation checkpointing and modules inside a compiled block are not recorded.
    """

    collectives: Collectives
    every: int
    first_step: int = 0  # of the stage, over all stages, for messages

    _start: int | None = field(default=None, init=False)  # the first step of this process
    _is_active = _in_forward = _compares_each_module = False

    def on_model_built(self, model: nn.Module) -> None:
        self._model = model
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._observe, name))
        model.register_forward_hook(partial(self._observe, FORWARD_END))

    def before_step(self, step: int, batch: Batch | None = None) -> None:
        self._step = self.first_step + step
        self._compares_each_module = any(hasattr(p, "ds_id") for p in self._model.parameters())  # ZeRO 3
        self._start = step if self._start is None else self._start
        self._is_active = step - self._start < FIRST_STEPS or (step - self._start) % self.every == 0
        self._executed: list[str] = []
        self._digest = hashlib.sha256()

    def after_backward(self, step: int) -> None:
        self._observe(BACKWARD_END)
        self._is_active = False

    def _observe(self, name: str, *_: object) -> None:
        """Record a module or the end of a pass; where ranks compare, a collective call that raises RunFailed."""
        if torch.compiler.is_compiling():  # first, so that Dynamo traces nothing else of this hook
            return
        is_recorded = self._is_active and (name == BACKWARD_END or (bool(name) and self._in_forward))
        self._in_forward = name != FORWARD_END and (self._in_forward or not name)  # "" is the model itself
        if not is_recorded:
            return
        self._executed.append(name)
        self._digest.update(f"{name}\n".encode())
        if not self._compares_each_module and name not in (FORWARD_END, BACKWARD_END):
            return
        digest = int.from_bytes(self._digest.digest()[:7], "big")
        if self.collectives.largest([digest, -digest]) == [digest, -digest]:
            return
        by_rank = self.collectives.gather_objects(self._executed)
        for position, names in enumerate(zip_longest(*by_rank, fillvalue="(nothing)")):
            if len(set(names)) > 1:
                ran = ", ".join(f"rank {rank} ran '{name}'" for rank, name in enumerate(names))
                raise RunFailed(
                    f"step {self._step}: ranks ran different modules; call {position}: {ran}. Gradients would have "
                    "been silently wrong. The modules a step runs must depend on the step number only, never on a "
                    "rank's own data."
                )
        raise AssertionError("the sequences are equal")


# ---- loss spikes


@dataclass(frozen=True)
class Spike:
    """A loss spike in `step`, which read `batch`; `number` counts the stage's spikes from 1."""

    number: int
    step: int
    batch: int
    loss: float
    median: float


class SpikeGuard:
    """Detects loss spikes and skips the data that caused them (PaLM, arXiv 2204.02311, section 5.1).

    After a spike the stage rolls back to its last checkpoint and skips the batches read since: a step reads batch =
    step + the batches skipped before it (contract C1). The state is part of every checkpoint and the same on every
    rank: a run killed between a rollback and the next checkpoint meets the spike again and skips the same batches.
    """

    def __init__(self, config: SpikeConfig | None, state: Mapping[str, Any] = MappingProxyType({})):
        """`state`: what `state` returned when the checkpoint was saved from which the stage resumes."""
        self.config = config
        self._losses = deque[float](state.get("losses", []), maxlen=config.window if config else 1)
        self.skipped = [(int(start), int(stop)) for start, stop in state.get("skipped", [])]
        self._num_rollbacks = state.get("rollbacks", 0)  # exceeds len(skipped) if two spikes preceded a checkpoint

    def state(self) -> dict[str, Any]:
        """Return the state, JSON-serialisable."""
        losses = list(self._losses) if self.config else []
        return {"skipped": [list(span) for span in self.skipped], "rollbacks": self._num_rollbacks, "losses": losses}

    def batch_of(self, step: int) -> int:
        """Return the batch that a step at or after the restored position reads."""
        return step + sum(stop - start for start, stop in self.skipped)

    def observe(self, step: int, loss: float) -> Spike | None:
        """Record the global batch's loss, before the update; return the spike if it is one."""
        config, losses = self.config, self._losses
        if config and len(losses) == config.window and loss > config.factor * (median := statistics.median(losses)):
            return Spike(self._num_rollbacks + 1, step, self.batch_of(step), loss, median)
        self._losses.append(loss)
        return None

    def skip_range(self, spike: Spike, resumed_at: int, stage: str) -> tuple[int, int]:
        """Skip the batches read since step `resumed_at` up to the spike and `skip` more; return them as (start, stop).

        Raises RunFailed if the stage has used up its rollbacks.
        """
        assert self.config is not None
        if spike.number > self.config.max_rollbacks:
            raise RunFailed(
                f"stage {stage}, step {spike.step}: the loss jumped to {spike.loss:.4g} (median of the last "
                f"{self.config.window}: {spike.median:.4g}) after {self.config.max_rollbacks} rollbacks; "
                "guards.spike.max_rollbacks allows no more. Inspect the data, lower optimizer.lr, or clip gradients "
                "with optimizer.max_grad_norm."
            )
        skipped = (self.batch_of(resumed_at), spike.batch + 1 + self.config.skip)
        self.skipped.append(skipped)
        self._num_rollbacks = spike.number
        return skipped


# ---- exhausted memory and storage

# Messages of allocators that raise a plain RuntimeError, or one of an accelerator library.
OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether device or host memory was exhausted, whichever library reports it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_reported = isinstance(error, RuntimeError) and any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)
    return is_reported or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def permanent_failures_explained(
    stage: Stage, collectives: Collectives, memory: Callable[[], dict[str, int]] | None = None
) -> Iterator[None]:
    """Raise RunFailed with remedies if the block exhausts memory or disk; `memory` returns bytes by category."""
    try:
        yield
    except NoSpace as error:
        raise RunFailed(
            f"stage {stage.name}: {error} Committed checkpoints are kept: run the same command once space is free."
        ) from error
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        engine, world_size = stage.run.engine, collectives.world_size
        share = -(-stage.config.global_batch_size // world_size)
        rows = -(-share // stage.num_micro_batches(world_size))
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        use = "It happened before the first step: the model and its optimizer state do not fit."
        if memory is not None:
            parts = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in memory().items())
            device = "in host memory"
            if collectives.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(collectives.device)
                peak = torch.cuda.max_memory_allocated(collectives.device)
                device = f"the device has {total / GIB:.2f} GiB, {free / GIB:.2f} GiB free; peak {peak / GIB:.2f} GiB"
            use = f"This rank's state at engine.zero_stage {engine.zero_stage}: {parts}; {device}"
        can_offload = not engine.offload_optimizer and engine.zero_stage > 0  # nothing is offloaded without ZeRO
        remedies = [
            (rows > 1, f"engine.micro_batch_size={rows // 2} (fewer activations; the gradient stays the same)"),
            (not engine.activation_checkpointing,
             "engine.activation_checkpointing=true (recomputes activations instead of storing them)"),
            (engine.zero_stage < 3,
             f"engine.zero_stage={engine.zero_stage + 1} (partitions more of the state among the ranks)"),
            (can_offload, "engine.offload_optimizer=true (keeps moments in host memory)"),
            (engine.precision == "float32", "engine.precision=bfloat16 (in a new run; it cannot change within one)"),
            (True, "more ranks (cluster.workers)"),
        ]  # fmt: skip
        raise RunFailed(
            f"stage {stage.name}, rank {collectives.rank} of {world_size}: out of memory: {reason}\n{use}\n"
            f"One forward held {rows} of the rank's {share} rows (engine.micro_batch_size: "
            f"{engine.micro_batch_size or 'not set'}); memory beyond the state above is activations.\n"
            "A restart would repeat it. Change, in this order: " + "; ".join(text for helps, text in remedies if helps)
        ) from error
