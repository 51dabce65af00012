"""Compute and memory of one step of a stage, measured by running the training step on a model without memory.

The code that trains runs on two small batches of full-size rows, with only the model on the meta device. All costs are
linear in the rows except the contrastive loss, which is run at the size of the global batch.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import RunFailed
from pipeline.config.schema import RunConfig, StageConfig, ViLTConfig
from pipeline.data.batch import IGNORED, Batch, BatchBuffer
from pipeline.data.examples.builder import batch_spec
from pipeline.models.forward import ForwardInput, ForwardOutput, Regions
from pipeline.models.model import Model
from pipeline.objectives import batch_groups
from pipeline.objectives.itc import CONTRASTS, itc_loss
from pipeline.planning.estimate import Line, Parameters, Work, accelerator_like, largest_micro_batch, memory_at
from pipeline.planning.probe import Kernels, Probe, unwatched
from pipeline.training.collectives import Collectives
from pipeline.training.deepspeed_engine import prepare_blocks, sharding_of
from pipeline.training.stages import Stage, freeze_untrained, stage_skeleton
from pipeline.training.step import TrainingStep

log = logging.getLogger(__name__)

SAMPLE_ROWS = 8
SPECIAL_TOKENS = 2  # [CLS] and [SEP], which are never masked
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GB = 10**9
USABLE = 0.9  # of a GPU's free memory: the allocator leaves some of it in fragments
UNBOUNDED = 2**62


def with_micro_batch(stage: Stage, collectives: Collectives, vocabulary: int) -> Stage:
    """Resolve `engine.micro_batch_size: auto` to the largest micro-batch that fits the smallest rank's memory.

    The gradient does not depend on it (C2), but the graph does (C3). A collective call. RunFailed if not one row fits.
    """
    engine, on_cuda = stage.run.engine, collectives.device.type == "cuda"
    if engine.micro_batch_size != "auto":
        return stage
    room, rows = UNBOUNDED, None
    if engine.memory_gb is not None:
        room = int(engine.memory_gb * GB)
    elif on_cuda:  # the allocator gives this stage what it keeps of an earlier one
        free, _ = torch.cuda.mem_get_info(collectives.device)
        room = int(USABLE * (free + torch.cuda.memory_reserved(collectives.device)))
    room = -collectives.largest([-room])[0]
    limit = "no limit is known on a CPU: a rank's whole share"
    if room < UNBOUNDED:
        if collectives.rank == 0:
            unsplit = stage.with_engine(micro_batch_size=None)
            work = work_of(unsplit, vocabulary, "cuda" if on_cuda else "cpu")
            sharding = sharding_of(unsplit, collectives.world_size, on_cuda)
            share = math.ceil(stage.config.global_batch_size / collectives.world_size)
            if rows := largest_micro_batch(work, sharding, share, room):
                needed = memory_at(work, sharding, share, rows).total
                limit = f"{rows} rows fit, {needed / GB:.2f} GB of {room / GB:.2f} GB expected"
        rows = collectives.broadcast(rows)
    if rows == 0:
        raise RunFailed(
            f"stage {stage.name}: not one row fits the {room / GB:.1f} GB of the smallest rank. Set a higher "
            "engine.zero_stage, or more ranks; `mome plan` shows what each needs"
        )
    if collectives.rank == 0:
        log.warning("stage %s: engine.micro_batch_size auto: %s", stage.name, limit)
    return stage.with_engine(micro_batch_size=rows)


def peak_step_seconds(gpu: str, stage: Stage, vocabulary: int, world_size: int) -> float | None:
    """Return a step's seconds at peak bfloat16 performance, for the MFU; None if `gpu`, CUDA's name, is unknown."""
    if (accelerator := accelerator_like(gpu)) is None:
        return None
    share = math.ceil(stage.config.global_batch_size / world_size)
    return work_of(stage, vocabulary, "cuda").step_flops(share, stage.num_micro_batches(world_size)) / accelerator.flops


def work_of(stage: Stage, vocabulary: int, kernels: Kernels, text_tokens: int | None = None) -> Work:
    """Return a stage's work per rank as a function of the micro-batch size, with texts as in `full_batch`."""
    every = math.lcm(*(objective.every for objective in stage.config.objectives.values()))
    rows = every * -(-SAMPLE_ROWS // every)  # every objective reads its exact fraction

    engines: list[ProbedEngine] = []
    shared: Model | None = None  # of the first engine, for all; the last engine has two micro-batches
    for batch_size, micro_batch_size in ((rows, None), (2 * rows, None), (2 * rows, rows)):
        stages = [config.model_copy(update={"global_batch_size": batch_size}) for config in stage.run.stages]
        cut = Stage(stage.run.model_copy(update={"stages": tuple(stages)}), stage.index)
        cut = cut.with_engine(micro_batch_size=micro_batch_size)
        engines.append(run_step(cut, vocabulary, kernels, text_tokens, shared))
        shared = engines[-1].model
    single, double, split = engines
    model, lines = single.model, {}
    for name in ("flops", "activations", "workspace", "tokens"):
        slope = (getattr(double, name) - getattr(single, name)) / rows
        lines[name] = Line(getattr(single, name) - slope * rows, slope)
    contrast_flops = contrast_bytes = 0
    if single.contrast_widths:  # ITC over the whole global batch, which every rank computes
        size = stage.config.global_batch_size
        shapes = [(size, width) for width in single.contrast_widths for _ in range(2)]
        features = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
        ids, scale = torch.empty(size, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
        with Probe([*features, ids, scale], kernels) as probe:
            pairs = zip(features[::2], features[1::2], strict=True)
            losses = [itc_loss(image, text, scale, ids) for image, text in pairs]
            torch.autograd.grad(torch.stack(losses).sum(), features)
            contrast_flops = probe.flops
            contrast_bytes = probe.peak_bytes + sum(4 * feature.numel() for feature in features)
    sizes = [parameter.numel() for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return Work(
        parameters=Parameters(trained, sum(sizes), buffers, largest=max(sizes), tensors=len(sizes)),
        flops_per_example_accumulated=split.flops / (2 * rows),
        batch_bytes_per_example=single.batch_bytes / rows,
        contrast_flops=contrast_flops,
        contrast_bytes=contrast_bytes,
        contrast_width=2 * sum(single.contrast_widths),
        **lines,
    )


# ---- one step on the meta device


def run_step(
    stage: Stage, vocabulary: int, kernels: Kernels, text_tokens: int | None = None, model: Model | None = None
) -> ProbedEngine:
    """Run one step over the stage's whole batch, on one rank and the meta device; `model`: that of an earlier step."""
    if model is None:
        settings = stage.run.engine
        model = stage_skeleton(stage, vocabulary).to(DTYPES[settings.precision])
        freeze_untrained(model, stage)
        prepare_blocks(model, settings.model_copy(update={"compile": False}))  # compilation changes no number here
    batch = full_batch(stage.run, stage.config, vocabulary, text_tokens)
    members = [tensor for tensor in vars(batch).values() if isinstance(tensor, Tensor)]
    probe = Probe([*model.parameters(), *model.buffers(), *members], kernels)
    engine = ProbedEngine(model, probe, sum(member.nbytes for member in members))
    alone = Collectives(timeout_seconds=None)  # the image tokenizer's arithmetic is not counted
    step = TrainingStep(engine, stage, alone, lambda image, grid: torch.zeros(len(image), grid**2, dtype=torch.int64))
    with probe:
        step(batch)
        engine.flops = probe.flops
    return engine


class ProbedEngine:
    """Runs the model on the meta device; the step receives zeros of the outputs' shapes in real memory."""

    flops = tokens = 0  # of one step of one rank
    activations = 0  # bytes alive when the backward of a micro-batch starts, at most
    workspace = 0  # additional bytes in the backward
    contrast_widths: tuple[int, ...] = ()

    def __init__(self, model: Model, probe: Probe, batch_bytes: int) -> None:
        self.model, self._probe, self.batch_bytes = model, probe, batch_bytes
        self._outputs: list[tuple[Tensor, Tensor]] = []  # the model's outputs and the zeros that replace them
        for parameter in model.parameters():
            if parameter.requires_grad:  # the engine keeps gradients elsewhere, and they are counted there
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        with unwatched():
            passes = {name: _on_meta(inputs) for name, inputs in passes.items()}
        for inputs in passes.values():  # positions of all rows: words, regions, and patches with the image's [CLS]
            self.tokens += 0 if inputs.text is None else inputs.text.numel()
            self.tokens += 0 if inputs.regions is None else inputs.regions.keep.numel()
            visible = inputs.visible_patches
            patches = self.model.config.grid**2 if visible is None else visible.shape[1]
            images = [image for image in (inputs.image, inputs.second_image) if image is not None]
            self.tokens += sum(len(image) * (1 + patches) for image in images)
        outputs = self.model(passes)
        if contrasted := [outputs["image"][head] for head in CONTRASTS if head in outputs.get("image", {})]:
            self.contrast_widths = tuple(features.shape[-1] for features in contrasted)
        replaced: ForwardOutput = {name: {} for name in outputs}
        for name, heads in outputs.items():
            for key, output in heads.items():
                with unwatched():
                    zeros = torch.zeros(output.shape, dtype=output.dtype)
                self._probe.follow(zeros, counted=False)
                if output.requires_grad:
                    self._outputs.append((output, zeros.requires_grad_()))
                replaced[name][key] = zeros
        return replaced

    def backward(self, loss: Tensor, last: bool) -> None:
        alive = self._probe.live_bytes
        self.activations = max(self.activations, alive)
        self._probe.peak_bytes = alive
        loss.backward()
        reached = [(output, read.grad) for output, read in self._outputs if read.grad is not None]
        self._outputs.clear()
        with unwatched():
            gradients = [gradient.to("meta") for _, gradient in reached]
        torch.autograd.backward([output for output, _ in reached], gradients)
        self.workspace = max(self.workspace, self._probe.peak_bytes - alive)


def _on_meta(inputs: ForwardInput | Regions) -> Any:
    """Move the tensors of a forward, and of its regions, to the meta device."""
    moved: dict[str, Any] = {}
    for name, value in vars(inputs).items():
        if isinstance(value, Regions):
            moved[name] = _on_meta(value)
        elif isinstance(value, Tensor):
            moved[name] = value.to("meta")
    return replace(inputs, **moved)


# ---- batches of maximum size


def full_batch(config: RunConfig, stage: StageConfig, vocabulary: int, text_tokens: int | None = None) -> Batch:
    """Return a global batch of maximum size (texts of `text_tokens`, if given), a function of its arguments alone.

    The masking's fractions give the numbers of masked words, patches and regions. Other fields are random or 0.
    """
    config, rows = config.for_stage(stage), stage.global_batch_size
    spec = batch_spec(config, stage, batch_groups(config, stage), rows)
    sizes, model = spec.sizes, config.model
    buffer, random = BatchBuffer(spec), np.random.default_rng(0)

    def positions(count: int, total: int) -> np.ndarray:
        return np.stack([random.permutation(total)[:count] for _ in range(rows)])

    for array in buffer.values():
        if array.dtype == np.uint8:
            array[...] = random.integers(0, 256, array.shape, dtype=np.uint8)
        elif array.dtype == np.float32:
            array[...] = random.random(array.shape, dtype=np.float32)
        else:
            array[...] = 0
    values: dict[str, object] = {
        "uid": np.arange(rows),
        "image_id": np.arange(rows),
        "visible_patches": np.arange(sizes.visible_patches),
        "patch_positions": positions(sizes.masked_patches, sizes.visible_patches),
        "patch_replacements": -1,
        "region_keep": True,
        "label": np.arange(rows) % (2 if "second_image" in buffer else stage.num_classes or 2),
    }
    if isinstance(model, ViLTConfig):  # the largest image fills the square of every image only partly
        largest = [side // model.patch_size * model.patch_size for side in (model.image_size, model.longest_side)]
        values |= {"image_size": largest, "second_image_size": largest}
    if "text" in buffer:
        length = min(text_tokens or sizes.text, sizes.text)
        first = min(vocabulary - 1, SPECIAL_TOKENS + 3)
        text = random.integers(first, vocabulary, (rows, sizes.text))
        words = length - SPECIAL_TOKENS
        masked = min(words, 2 * math.ceil(stage.masking.mlm_probability * words))  # as if masked words had two pieces
        at = 1 + positions(masked, words)
        masked_text, mask_positions, labels = text.copy(), np.zeros_like(text), np.full_like(text, IGNORED)
        np.put_along_axis(masked_text, at, first, axis=1)
        mask_positions[:, :masked], labels[:, :masked] = at, np.take_along_axis(text, at, axis=1)
        keep = np.arange(sizes.text) < length
        values |= {"text": text, "text_keep": keep, "masked_text": masked_text}
        values |= {"mask_positions": mask_positions, "mask_labels": labels}
    if "answers" in buffer:  # one answer per question
        answers = np.full(buffer["answers"].shape, -1)
        answers[:, 0] = np.arange(rows) % (stage.num_answers or 2)
        values |= {"answers": answers, "answer_scores": answers >= 0}
    if "region_positions" in buffer:
        masked_regions = positions(sizes.masked_regions, sizes.regions)
        hidden = np.zeros((rows, sizes.regions), dtype=np.bool_)
        np.put_along_axis(hidden, masked_regions, True, axis=1)
        values |= {"region_positions": masked_regions, "region_hidden": hidden}
    for name, value in values.items():
        if name in buffer:
            buffer[name][...] = value
    return buffer.to_batch(0, range(rows))
