"""One training step over a global batch. Its gradient is the same for all ranks x micro-batch x accumulation (C2).

Every loss is a sum over examples or tokens divided by a count over the whole global batch. Without accumulation a step
makes two engine calls and one backward: first the towers and the forwards over unchanged examples; then the forwards
over negatives, if these are drawn by ITC similarity. With accumulation: the towers of all micro-batches without
gradient, then everything per micro-batch. Which examples and objectives a step reads depends on the step and the
examples' places alone, so that all ranks run the same graph (C3).

Shapes: B global batch, n examples of this rank, S sources, N layers.
"""

import statistics
import time
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.order import share
from pipeline.data.randomness import hash64, uniform_array
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives import ImageTokenizer, NegativePool, Objective, ObjectiveContext, RowSwap, objective_types
from pipeline.objectives.itc import Contrast, feature_spread, global_contrast
from pipeline.training.collectives import Collectives
from pipeline.training.stages import Stage

RELEASED_MLM_FACTOR = 0.25  # by which VLMo's release multiplies the loss of MLM on pairs besides its weight
Swapped = dict[str, tuple[str, Batch]]  # forward -> the objective it belongs to, and its swapped examples


class StepEngine(Protocol):
    """The part of an engine that a step uses; `last` marks the last micro-batch before the update."""

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput: ...

    def backward(self, loss: Tensor, last: bool) -> None: ...


class TrainingStep:
    """Computes the losses of global batches and gives the engine their gradient; the caller steps the engine."""

    def __init__(
        self, engine: StepEngine, stage: Stage, collectives: Collectives, image_tokenizer: ImageTokenizer | None = None
    ):
        self.engine, self.stage, self.collectives = engine, stage, collectives
        self.seed, self.reproduces_release = hash64(stage.run.seed, stage.name), stage.run.reproduce_vlmo_release
        self.weights = {name: settings.weight for name, settings in stage.config.objectives.items()}
        if self.reproduces_release and stage.source_type == "pairs" and "mlm" in self.weights:
            self.weights["mlm"] *= RELEASED_MLM_FACTOR
        context = ObjectiveContext(
            stage.config,
            stage.source_type,
            self.seed,
            stage.run.model.patch_size,
            image_tokenizer,
            self._drop_path_mask,
        )
        self.objectives = {name: kind(context) for name, kind in objective_types(stage.config).items()}
        self.itc = self.objectives.pop("itc", None)
        self.needs_similarity = any(objective.needs_similarity for objective in self.objectives.values())
        self.accumulation = stage.num_micro_batches(collectives.world_size)
        # This rank's part of the last step with metrics: diagnostics by name, and by objective (S, 2) the loss summed
        # over each source's examples and the number of summands.
        self.diagnostics: dict[str, Tensor] = {}
        self.by_source: dict[str, Tensor] = {}
        self._with_metrics = False
        self._num_sources = 0  # sources to report losses of
        self._forward_seconds: list[float] = []  # forwards, because no rank waits in them for another (below ZeRO 3)
        self._forward_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, batch: Batch, with_metrics: bool = False) -> dict[str, Tensor]:
        """Run forward and backward; return this rank's part of each loss (0-d, detached), unweighted but for `loss`."""
        self._with_metrics, num_sources = with_metrics, len(self.stage.config.sources)
        self._num_sources = num_sources if with_metrics and num_sources > 1 else 0
        self.diagnostics, self.by_source = {}, {}
        # Dropout (ImageBERT) is seeded by the step, so that a resumed run draws the same masks (C4).
        torch.manual_seed(hash64(self.seed, batch.step, "dropout", self.collectives.rank))
        batch, device = batch.to(self.collectives.device), self.collectives.device
        counts: dict[str, Tensor] = {}  # the divisor of each objective's sum: its count over the global batch
        if self.objectives:
            own = [objective.count(self._examples(batch, name)[1]) for name, objective in self.objectives.items()]
            parts = [torch.as_tensor(count, device=device).to(torch.float32) for count in own]
            total = self.collectives.sum(torch.stack(parts)).clamp(min=1)
            counts = dict(zip(self.objectives, total.unbind(), strict=True))
        if self.accumulation > 1:
            return self._accumulated(batch, counts)
        swapped = {} if self.needs_similarity else self._swap(batch, None)
        with self._timed():
            outputs = self.engine(self._forwards(batch, swapped))
        contrast = self._contrast(outputs, batch)
        if self.needs_similarity:
            outputs |= self.engine(self._forwards(None, self._swap(batch, contrast)))
        return self._backward(outputs, batch, counts, contrast, slice(0, len(batch)), last=True)

    def forward_seconds(self) -> float:
        """Return the median seconds of this rank's forwards since the last call. The device must have finished."""
        seconds = [*self._forward_seconds, *(start.elapsed_time(end) / 1000 for start, end in self._forward_events)]
        self._forward_seconds, self._forward_events = [], []
        return statistics.median(seconds) if seconds else 0.0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Time the forward in the block: by stream events on a GPU, which need no synchronisation."""
        if self.collectives.device.type != "cuda":
            began = time.perf_counter()
            yield
            self._forward_seconds.append(time.perf_counter() - began)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._forward_events.append((start, end))

    def _accumulated(self, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        slices = [slice(*share(len(batch), k, self.accumulation)) for k in range(self.accumulation)]
        contrast = None
        if self.itc is not None:
            with torch.no_grad():
                towers = [self.engine(self.itc.forwards(batch.rows(rows))) for rows in slices]
            whole = {  # scales (0-d) are the same in every micro-batch
                name: {
                    key: torch.cat([part[name][key] for part in towers]) if value.dim() else value
                    for key, value in heads.items()
                }
                for name, heads in towers[0].items()
            }
            contrast = self._contrast(whole, batch)
        swapped = self._swap(batch, contrast)
        report: dict[str, Tensor] = {}
        for rows in slices:
            examples = batch.rows(rows)
            own_swapped = {
                name: (objective, negatives.rows(torch.isin(negatives.place, examples.place).nonzero().flatten()))
                for name, (objective, negatives) in swapped.items()
            }
            forwards = self._forwards(examples, own_swapped)
            with self._timed():
                outputs = self.engine(forwards)
            losses = self._backward(outputs, examples, counts, contrast, rows, last=rows is slices[-1])
            report = {name: report[name] + loss if report else loss for name, loss in losses.items()}
        return report

    def _backward(
        self,
        outputs: ForwardOutput,
        examples: Batch,
        counts: dict[str, Tensor],
        contrast: Contrast | None,
        rows: slice,
        last: bool,
    ) -> dict[str, Tensor]:
        """Run the backward of the rows `rows` of this rank; return its part of the global batch's losses."""
        losses = {n: o.loss(outputs, self._examples(examples, n)[1]) / counts[n] for n, o in self.objectives.items()}
        if self._with_metrics:
            self._add_metrics(outputs, examples)
        weighted = [self.weights[name] * loss for name, loss in losses.items()]
        parts = self.collectives.world_size * self.accumulation
        if contrast is not None:
            # A surrogate: of all ranks and micro-batches together, its gradient is that of the global loss.
            weighted += [(outputs[n][head].float() * g[rows]).sum() for (n, head), g in contrast.gradients.items()]
            weighted += [outputs["image"][n].float() * g / parts for n, g in contrast.scale_gradients.items()]
        self.engine.backward(torch.stack(weighted).sum() * parts, last)  # DeepSpeed divides by both
        report = {name: loss.detach().float() for name, loss in losses.items()}
        if contrast is not None:
            report["itc"] = contrast.loss / parts
        total = torch.stack([self.weights[name] * loss for name, loss in report.items()]).sum()
        return {"loss": total} | report

    def _examples(self, batch: Batch, name: str) -> tuple[Tensor, Batch]:
        """Return indices (int64, CPU) and examples that an objective reads in this step, one in `every` in rotation."""
        every = self.stage.config.objectives[name].every
        indices = torch.nonzero((batch.place + batch.step) % every == 0).flatten()
        return indices, batch if every == 1 else batch.rows(indices)

    def _forwards(self, batch: Batch | None, swapped: Swapped) -> dict[str, ForwardInput]:
        """Return the forwards over unchanged examples, if any, and over swapped ones, those of one name merged."""
        forwards: dict[str, ForwardInput] = {}
        if batch is not None:
            forwards = self.itc.forwards(batch) if self.itc is not None else {}
            for objective_name, objective in self.objectives.items():
                for name, forward in objective.forwards(self._examples(batch, objective_name)[1]).items():
                    if (first := forwards.get(name)) is None:
                        forwards[name] = forward
                        continue
                    absent = [field.name for field in fields(first) if getattr(first, field.name) is None]
                    inputs: dict[str, Any] = {field_name: getattr(forward, field_name) for field_name in absent}
                    forwards[name] = replace(first, **inputs, heads=(*first.heads, *forward.heads))
        for name, (objective_name, examples) in swapped.items():
            forwards[name] = self.objectives[objective_name].fusion_forward(examples, name)
        return forwards

    def _contrast(self, outputs: ForwardOutput, batch: Batch) -> Contrast | None:
        """Return the global batch's contrast, or None without ITC. A collective call."""
        if self.itc is None:
            return None
        size, world_size, weight = self.stage.config.global_batch_size, self.collectives.world_size, self.weights["itc"]
        own = slice(*share(size, self.collectives.rank, world_size))
        gather = partial(self.collectives.gather_rows, batch=size)
        # In VLMo's release the gather detaches other ranks' features, and DDP averages what is left of their gradient.
        divisor = world_size if self.reproduces_release else 1
        contrast = global_contrast(outputs, batch, weight, gather, own, self._num_sources, divisor)
        if self._with_metrics:  # both are the global batch's, and the caller sums over ranks
            self.diagnostics["itc_scale"] = contrast.scale / world_size
            self.diagnostics["itc_spread"] = feature_spread(contrast.image, contrast.text) / world_size
        if contrast.by_source is not None:
            self.by_source["itc"] = contrast.by_source / world_size
        return contrast

    def _swap(self, batch: Batch, contrast: Contrast | None) -> Swapped:
        """Return the examples with other examples' images or texts that the objectives need as negatives."""
        drawing = [n for n, o in self.objectives.items() if type(o).swaps is not Objective.swaps]
        if not drawing:
            return {}
        size, gather_rows = self.stage.config.global_batch_size, self.collectives.gather_rows
        pool = NegativePool(gather_rows(batch.image_id, size), gather_rows(batch.source, size))
        if contrast is not None:
            pool = pool._replace(image=contrast.image, text=contrast.text, scale=contrast.scale)
        swapped: Swapped = {}
        for objective in drawing:
            indices, examples = self._examples(batch, objective)
            for name, swaps in self.objectives[objective].swaps(examples, pool).items():
                swapped[name] = (objective, swap_rows(self.collectives, batch, size, indices, swaps))
        return swapped

    def _add_metrics(self, outputs: ForwardOutput, batch: Batch) -> None:
        """Add a micro-batch's diagnostics and losses per source; these index the outputs, one source at a time."""
        for name, objective in self.objectives.items():
            indices, examples = self._examples(batch, name)
            for metric, value in objective.diagnostics(outputs, examples).items():
                self.diagnostics[metric] = self.diagnostics[metric] + value if metric in self.diagnostics else value
            if not self._num_sources:
                continue
            source, device = batch.source.cpu()[indices], examples.uid.device
            sums = torch.zeros(self._num_sources, 2, device=device)
            with torch.no_grad():
                for number in range(self._num_sources):
                    rows = torch.nonzero(source == number).flatten()
                    if len(rows):
                        index, chosen = rows.to(device, non_blocking=True), examples.rows(rows)
                        own: Any = {key: _IndexedOutputs(heads, index, len(source)) for key, heads in outputs.items()}
                        count = torch.as_tensor(objective.count(chosen), device=device)
                        sums[number] = torch.stack([objective.loss(own, chosen).float(), count.float()])
            self.by_source[name] = self.by_source.get(name, 0) + sums

    def _drop_path_mask(self, examples: Batch, forward: str) -> Tensor | None:
        """Return which branches (attention, feed-forward) a forward keeps: (n, N, 2) bool, or None without drop path.

        It is a hash of the example's place in the global batch, the step, the layer and the forward (C2): any repeated
        forward, on any rank and in any micro-batch, drops the same branches.
        """
        rates = self.stage.run.model.drop_path_rates
        if not any(rates):
            return None
        branch = np.arange(2 * len(rates), dtype=np.uint64)
        counters = examples.place.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(2 * len(rates)) + branch
        uniform = uniform_array(hash64(self.seed, examples.step, forward, "drop path"), counters)
        keep = torch.from_numpy(uniform.reshape(-1, len(rates), 2) >= np.asarray(rates)[:, None])
        return keep.to(self.collectives.device, non_blocking=True)


def swap_rows(collectives: Collectives, batch: Batch, size: int, indices: Tensor, swaps: list[RowSwap]) -> Batch:
    """Return the examples at `indices` (n,) with swapped fields; only these travel between ranks. A collective call."""
    result = batch.rows(indices)
    for swap in swaps:
        places = torch.full((len(batch),), -1, dtype=torch.int64)
        places[indices] = swap.places.cpu()
        fetch = collectives.fetcher(places, size)
        is_swapped = torch.nonzero(places[indices] >= 0).flatten()
        for name, padding in swap.fields.items():
            if (values := getattr(batch, name)) is None:
                continue
            sizes = collectives.largest(list(values.shape[1:]))
            amounts = [n for most, own in zip(sizes, values.shape[1:], strict=True) for n in (most - own, 0)][::-1]
            if any(amounts):  # the ranks' trailing dimensions differ
                values = F.pad(values, amounts, value=padding)
            swapped = values[indices.to(values.device)]
            swapped[is_swapped.to(values.device)] = fetch(values)
            changes: dict[str, Any] = {name: swapped}
            result = replace(result, **changes)
    return result


class _IndexedOutputs(UserDict[str, Tensor]):
    """A forward's outputs for some of its examples, copied only when a loss reads them; scales stay whole."""

    def __init__(self, heads: Mapping[str, Tensor], index: Tensor, num_examples: int):
        super().__init__(heads)
        self._index, self._num_examples = index, num_examples

    def __getitem__(self, name: str) -> Tensor:
        value = self.data[name]
        return value[self._index] if value.dim() and len(value) == self._num_examples else value
