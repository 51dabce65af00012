"""Compute and memory of one step of a stage, measured by running the training step on a model without memory.

The code that trains is run itself: `TrainingStep`, its objectives and the model's forward and backward, on two small
batches of full-size rows. All costs are linear in the rows except the contrastive loss, which spans the global batch
and is run at its size. The estimate therefore follows every change of a model, an objective or the step.

The model is on the meta device; computations of the step itself (losses, drawing negatives) are real.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.models.forward import ForwardInput, ForwardOutput, Regions
from pipeline.models.model import Model
from pipeline.objectives.itc import CONTRASTS, itc_loss
from pipeline.planning.estimate import largest_share
from pipeline.planning.hardware import accelerator_like
from pipeline.planning.memory import Line, Parameters, Work
from pipeline.planning.probe import Kernels, Probe, unwatched
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_setup import prepare_blocks
from pipeline.training.full_batch import full_batch
from pipeline.training.stages import stage_skeleton, trained_parts
from pipeline.training.step import TrainingStep, num_micro_batches

SAMPLE_ROWS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def work_of(config: RunConfig, index: int, vocabulary: int, kernels: Kernels, text_tokens: int | None = None) -> Work:
    """Return the work of stage `index` per rank as a function of the micro-batch size. Takes seconds.

    `text_tokens` is the length of every text (default: the longest that the stage allows).
    """
    config = config.for_stage(config.stages[index])
    stage = config.stages[index]
    model = model_without_memory(config, index, vocabulary)
    every = math.lcm(*(objective.every for objective in stage.objectives.values()))
    rows = every * -(-SAMPLE_ROWS // every)  # every objective reads its exact fraction

    def ran(count: int, micro_batch_size: int | None = None) -> Ran:
        return run_step(model, _cut(config, index, count, micro_batch_size), index, vocabulary, kernels, text_tokens)

    single, double, split = ran(rows), ran(2 * rows), ran(2 * rows, rows)  # the last one in two micro-batches

    def line(number: Callable[[Ran], int]) -> Line:
        return Line.through((rows, number(single)), (2 * rows, number(double)))

    contrast = _contrast(stage.global_batch_size, single.contrast_widths, kernels) if single.contrast_widths else (0, 0)
    return Work(
        parameters=parameters_of(model),
        flops=line(lambda ran: ran.flops),
        flops_per_example_accumulated=split.flops / (2 * rows),
        activations=line(lambda ran: ran.activations),
        workspace=line(lambda ran: ran.workspace),
        tokens=line(lambda ran: ran.tokens),
        batch_bytes_per_example=single.batch_bytes / rows,
        contrast_flops=contrast[0],
        contrast_bytes=contrast[1],
        contrast_width=2 * sum(single.contrast_widths),
    )


def peak_step_seconds(gpu: str, config: RunConfig, index: int, vocabulary: int, world_size: int) -> float | None:
    """Return the duration of a step of stage `index` at the peak bfloat16 performance of a GPU; None if unknown.

    Multiplied by the measured steps per second it is the model FLOPs utilisation (MFU). Texts count with the longest
    length that the stage allows. `gpu` is the name CUDA gives. The call takes seconds.
    """
    accelerator = accelerator_like(gpu)
    if accelerator is None:
        return None
    batch = config.stages[index].global_batch_size
    parts = num_micro_batches(batch, world_size, config.engine.micro_batch_size)
    work = work_of(config, index, vocabulary, "cuda")
    return work.step_flops(largest_share(batch, world_size), parts) / accelerator.flops


def model_without_memory(config: RunConfig, index: int, vocabulary: int) -> Model:
    """Build the stage's model on the meta device, in its precision and with its frozen parts frozen."""
    model = stage_skeleton(config, index, vocabulary).to(DTYPES[config.engine.precision])
    trained = trained_parts(model, config, config.stages[index])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in trained)
    prepare_blocks(model, config.engine.model_copy(update={"compile": False}))  # compilation changes no number here
    return model


def parameters_of(model: Model) -> Parameters:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Parameters(
        trained=sum(size for size, is_trained in sizes if is_trained),
        frozen=sum(size for size, is_trained in sizes if not is_trained),
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        largest=max(size for size, _ in sizes),
        tensors=len(sizes),
    )


@dataclass(frozen=True)
class Ran:
    """Costs of one step of one rank, and the peak of one of its micro-batches."""

    flops: int
    activations: int  # bytes alive when the backward starts
    workspace: int  # additional bytes in the backward
    tokens: int
    batch_bytes: int
    contrast_widths: tuple[int, ...]


def run_step(
    model: Model, config: RunConfig, index: int, vocabulary: int, kernels: Kernels, text_tokens: int | None = None
) -> Ran:
    """Run one step of stage `index` over its whole batch, on one rank with a model on the meta device."""
    stage = config.stages[index]
    batch = full_batch(config, stage, stage.global_batch_size, vocabulary, text_tokens)
    members = [tensor for f in fields(batch) if isinstance(tensor := getattr(batch, f.name), Tensor)]
    probe = Probe([*model.parameters(), *model.buffers(), *members], kernels)
    engine = _WatchedEngine(model, probe)
    step = TrainingStep(engine, config, stage, _ImaginedRank(), _no_tokens)
    with probe:
        step(batch)
        flops = probe.flops
    batch_bytes = sum(member.numel() * member.element_size() for member in members)
    return Ran(flops, engine.activations, engine.workspace, engine.tokens, batch_bytes, engine.contrast_widths)


class _WatchedEngine:
    """Runs the model on the meta device; the step receives zeros of the outputs' shapes in real memory."""

    def __init__(self, model: Model, probe: Probe) -> None:
        self.model, self._probe = model, probe
        self._outputs: list[tuple[Tensor, Tensor]] = []  # the model's outputs and the zeros that replace them
        self.activations = self.workspace = self.tokens = 0
        self.contrast_widths: tuple[int, ...] = ()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_release)

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        with unwatched():
            passes = {name: _on_meta(inputs) for name, inputs in passes.items()}
        self.tokens += sum(_num_tokens(inputs, self.model.config.num_patches) for inputs in passes.values())
        outputs = self.model(passes)
        if contrasted := [outputs["image"][head] for head in CONTRASTS if head in outputs.get("image", {})]:
            self.contrast_widths = tuple(features.shape[-1] for features in contrasted)
        return {name: {key: self._read(value) for key, value in heads.items()} for name, heads in outputs.items()}

    def _read(self, output: Tensor) -> Tensor:
        with unwatched():
            read = torch.zeros(output.shape, dtype=output.dtype)
        self._probe.leave_out(read)
        if output.requires_grad:
            read.requires_grad_()
            self._outputs.append((output, read))
        return read

    def backward(self, loss: Tensor, last: bool) -> None:
        alive = self._probe.live_bytes
        self.activations = max(self.activations, alive)
        self._probe.forget_peak()
        loss.backward()
        reached = [(output, read.grad) for output, read in self._outputs if read.grad is not None]
        self._outputs.clear()
        with unwatched():
            gradients = [gradient.to("meta") for _, gradient in reached]
        torch.autograd.backward([output for output, _ in reached], gradients)
        self.workspace = max(self.workspace, self._probe.peak_bytes - alive)


def _release(parameter: Tensor) -> None:
    """Drop a gradient at once: the engine keeps gradients elsewhere, and they are counted there."""
    parameter.grad = None


class _ImaginedRank(Collectives):
    """A single rank without a process group: every collective returns its input."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.local_rank, self.device = 0, 1, 0, torch.device("cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_rows(self, rows: Tensor, batch: int) -> Tensor:
        return rows.detach().clone()

    def fetcher(self, positions: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
        chosen = positions[positions >= 0]
        return lambda rows: rows[chosen.to(rows.device)]


def _no_tokens(images: Tensor, grid: int) -> Tensor:
    """Return zeros (n, P) instead of running the image tokenizer, whose arithmetic is not counted."""
    return torch.zeros(len(images), grid * grid, dtype=torch.int64)


def _contrast(batch: int, widths: tuple[int, ...], kernels: Kernels) -> tuple[int, int]:
    """Return the FLOPs and the peak bytes of the contrastive loss over `batch` rows on each rank."""
    features = [torch.empty(batch, width, device="meta", requires_grad=True) for width in widths for _ in range(2)]
    ids, scale = torch.empty(batch, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
    with Probe([*features, ids, scale], kernels) as probe:
        pairs = zip(features[::2], features[1::2], strict=True)
        losses = [itc_loss(image, text, scale, ids) for image, text in pairs]
        torch.autograd.grad(torch.stack(losses).sum(), features)
        return probe.flops, probe.peak_bytes + sum(4 * feature.numel() for feature in features)


def _on_meta(inputs: ForwardInput) -> ForwardInput:
    """Move the forward's tensors to the meta device."""
    moved: dict[str, Any] = {}
    for f in fields(inputs):
        value = getattr(inputs, f.name)
        if isinstance(value, Tensor):
            moved[f.name] = value.to("meta")
        elif isinstance(value, Regions):
            moved[f.name] = Regions(*(getattr(value, g.name).to("meta") for g in fields(value)))
    return replace(inputs, **moved)


def _num_tokens(inputs: ForwardInput, num_patches: int) -> int:
    """Count the positions of all rows of a forward: words, regions, and patches with the image's [CLS]."""
    count = 0
    if inputs.text is not None:
        count += inputs.text.numel()
    if inputs.regions is not None:
        count += inputs.regions.keep.numel()
    for image in (inputs.image, inputs.second_image):
        if image is not None:
            count += len(image) * (
                1 + (num_patches if inputs.visible_patches is None else inputs.visible_patches.shape[1])
            )
    return count


def _cut(config: RunConfig, index: int, batch: int, micro_batch_size: int | None) -> RunConfig:
    """Return the run with a global batch of `batch` rows, for one rank."""
    stages = [stage.model_copy(update={"global_batch_size": batch}) for stage in config.stages]
    engine = config.engine.model_copy(update={"micro_batch_size": micro_batch_size})
    return config.model_copy(update={"stages": tuple(stages), "engine": engine})
