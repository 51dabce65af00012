"""One training step over a global batch: its gradient is the same for every ranks x micro-batch x accumulation (C2).

How: every loss is a sum over rows or tokens divided by a count of the whole global batch. `terms` says what each
objective reads and sums; `contrast` does the one that needs all ranks' features at once; `exchange` brings the rows
that matching reads as negatives.

A step without accumulation makes two engine calls and one backward: the towers, the masked and the true pairs first;
then the negatives, where they need the contrastive scores. With accumulation: the towers, then everything per
micro-batch. Which rows and objectives a step reads follows from the step and the rows' places alone, so that all ranks
run the same graph (C3).

Shapes: B global batch, n this rank's rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from pipeline.config.schema import Objective, RunConfig, StageConfig
from pipeline.data.batch import Batch
from pipeline.data.randomness import hash64
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.training import release
from pipeline.training.by_source import of_each_source
from pipeline.training.collectives import Collectives, share
from pipeline.training.contrast import Contrast, contrast_of, tower_passes
from pipeline.training.drop_path import drop_path_mask
from pipeline.training.engine import ForwardTimer, StepEngine
from pipeline.training.exchange import exchanged
from pipeline.training.terms import terms_of
from pipeline.training.terms.term import Candidates, ImageTokenizer, Setting, Term

Exchanged = dict[str, tuple[Objective, Batch]]  # by pass: who asked, and its chosen rows


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch: what backward is called on, and each objective's share of the global mean."""

    differentiated: Tensor
    by_objective: dict[Objective, Tensor]  # without contrast, whose gradient is injected


class TrainingStep:
    """Computes the losses of global batches and gives the engine their gradient; the caller steps the engine."""

    def __init__(
        self,
        engine: StepEngine,
        config: RunConfig,
        stage: StageConfig,
        collectives: Collectives,
        image_tokenizer: ImageTokenizer | None = None,
    ):
        self.engine, self.stage, self.collectives = engine, stage, collectives
        self.objectives = stage.objectives
        self.drop_path_rates = config.model.drop_path_rates
        self.seed = hash64(config.seed, stage.name)
        patch_size, source_type = config.model.patch_size, config.source_type_of(stage)
        self.reproduce_vlmo_release = config.reproduce_vlmo_release
        self.weights = {
            name: objective.weight * (release.factor(name, source_type) if config.reproduce_vlmo_release else 1.0)
            for name, objective in stage.objectives.items()
        }
        self.terms = terms_of(Setting(stage, source_type, self.seed, patch_size, image_tokenizer, self._keeps))
        self.accumulation = accumulation(
            stage.global_batch_size, collectives.world_size, config.engine.micro_batch_size
        )
        self.forward_timer = ForwardTimer(collectives.device)
        # Of the last call that was asked to tell: this rank's part of what terms know beside losses, by name; and by
        # objective (S, 2) its sums and counts of each source.
        self.signs: dict[str, Tensor] = {}
        self.by_source: dict[Objective, Tensor] = {}
        self._tells = False

    def __call__(self, batch: Batch, tell: bool = False) -> dict[str, Tensor]:
        """Forward and backward over this rank's rows of one global batch.

        Returns this rank's part of each objective's loss (0-d, detached): their sum over ranks is the loss of the
        global batch, unweighted except in `loss`. With `tell` also fills `signs`, and in a stage of several sources
        `by_source`.
        """
        self._tells = tell
        self.signs, self.by_source = {}, {}
        # What a model drops out (ImageBERT) follows from the step, so that a resumed run drops the same (C4).
        torch.manual_seed(hash64(self.seed, batch.step, "dropout", self.collectives.rank))
        batch = batch.to(self.collectives.device)
        counts = self._counts(batch)
        if self.accumulation == 1:
            return self._whole(batch, counts)
        return self._accumulated(batch, counts)

    def _whole(self, batch: Batch, counts: dict[Objective, Tensor]) -> dict[str, Tensor]:
        given = {} if self._draws_by_contrast else self._exchange(batch, None)
        passes = self._passes(batch) | self._exchanged_passes(given)
        with self.forward_timer.forward():
            outputs = self.engine(passes)
        contrast = self._contrast(outputs, batch)
        if self._draws_by_contrast:
            outputs |= self.engine(self._exchanged_passes(self._exchange(batch, contrast)))
        losses = self._losses(outputs, batch, counts, contrast, slice(0, len(batch)))
        self.engine.backward(losses.differentiated * self.collectives.world_size, last=True)
        return self._report(losses, contrast)

    def _accumulated(self, batch: Batch, counts: dict[Objective, Tensor]) -> dict[str, Tensor]:
        pieces = [slice(*share(len(batch), k, self.accumulation)) for k in range(self.accumulation)]
        contrast = None
        if "itc" in self.objectives:
            with torch.no_grad():
                towers = [self.engine(tower_passes(batch.rows(piece), self._keeps)) for piece in pieces]
            contrast = self._contrast(_concatenated(towers), batch)
        given = self._exchange(batch, contrast)
        total: dict[str, Tensor] = {}
        for k, piece in enumerate(pieces):
            rows = batch.rows(piece)
            passes = self._passes(rows) | self._exchanged_passes(_within(given, rows.place))
            with self.forward_timer.forward():
                outputs = self.engine(passes)
            losses = self._losses(outputs, rows, counts, contrast, piece)
            scale = self.collectives.world_size * self.accumulation  # DeepSpeed divides by both
            self.engine.backward(losses.differentiated * scale, last=k == len(pieces) - 1)
            for name, loss in self._report(losses, contrast).items():
                total[name] = total[name] + loss if name in total else loss
        return total

    # ---- what is read

    def _chosen(self, batch: Batch, objective: Objective) -> Tensor:
        """Which rows an objective reads in this step: one in `every`, in turn. Index tensor on the CPU."""
        every = self.objectives[objective].every
        return torch.nonzero((batch.place + batch.step) % every == 0).flatten()

    def _read(self, batch: Batch, objective: Objective) -> Batch:
        """The rows themselves."""
        return batch if self.objectives[objective].every == 1 else batch.rows(self._chosen(batch, objective))

    def _counts(self, batch: Batch) -> dict[Objective, Tensor]:
        """What each objective's sum is divided by, over the whole global batch."""
        if not self.terms:
            return {}
        device = self.collectives.device
        own = [torch.as_tensor(t.count(self._read(batch, o)), device=device) for o, t in self.terms.items()]
        total = self.collectives.sum(torch.stack([count.to(torch.float32) for count in own])).clamp(min=1)
        return dict(zip(self.terms, total.unbind(), strict=True))

    def _keeps(self, rows: Batch, name: str) -> Tensor | None:
        keeps = drop_path_mask(self.seed, rows.step, rows.place, name, self.drop_path_rates)
        return None if keeps is None else keeps.to(self.collectives.device, non_blocking=True)

    def _passes(self, batch: Batch) -> dict[str, ForwardInput]:
        """Every pass over rows as they are; what several objectives ask of the same name is one pass."""
        passes = tower_passes(batch, self._keeps) if "itc" in self.objectives else {}
        for objective, term in self.terms.items():
            for name, one in term.passes(self._read(batch, objective)).items():
                passes[name] = _merged(passes[name], one) if name in passes else one
        return passes

    # ---- the whole batch's contrast and negatives

    @property
    def _draws_by_contrast(self) -> bool:
        return "itm" in self.objectives and self.stage.negatives == "hard"

    def _contrast(self, outputs: ForwardOutput, batch: Batch) -> Contrast | None:
        if "itc" not in self.objectives:
            return None
        sources = self._num_sources_told
        found = contrast_of(
            outputs, batch, self.stage.global_batch_size, self.weights["itc"], self.collectives, sources
        )
        if self._tells:
            self.signs["itc_scale"] = found.scale / self.collectives.world_size
        if found.by_source is not None:  # of the whole batch, on every rank
            self.by_source["itc"] = found.by_source / self.collectives.world_size
        return release.cut(found, self.collectives.world_size) if self.reproduce_vlmo_release else found

    def _exchange(self, batch: Batch, contrast: Contrast | None) -> Exchanged:
        """The rows with other rows' pictures and texts that the terms ask for."""
        asking = [objective for objective, term in self.terms.items() if type(term).exchanges is not Term.exchanges]
        if not asking:
            return {}
        size = self.stage.global_batch_size
        candidates = Candidates(
            self.collectives.gather_rows(batch.image_id, size), self.collectives.gather_rows(batch.source, size)
        )
        if contrast is not None:
            candidates = replace(candidates, image=contrast.image, text=contrast.text, scale=contrast.scale)
        found: Exchanged = {}
        for objective in asking:
            rows = self._chosen(batch, objective)
            for name, asked in self.terms[objective].exchanges(batch.rows(rows), candidates).items():
                found[name] = (objective, exchanged(self.collectives, batch, size, rows, asked))
        return found

    def _exchanged_passes(self, given: Exchanged) -> dict[str, ForwardInput]:
        return {name: self.terms[objective].exchanged_pass(rows, name) for name, (objective, rows) in given.items()}

    # ---- losses

    def _losses(
        self,
        outputs: ForwardOutput,
        batch: Batch,
        counts: dict[Objective, Tensor],
        contrast: Contrast | None,
        piece: slice,
    ) -> Losses:
        losses = {o: term.loss(outputs, self._read(batch, o)) / counts[o] for o, term in self.terms.items()}
        if self._tells:
            self._add_signs(outputs, batch)
        if self._num_sources_told:
            self._add_by_source(outputs, batch)
        weighted = [self.weights[objective] * loss for objective, loss in losses.items()]
        if contrast is not None:
            weighted.append(contrast.injected(outputs, piece, self.collectives.world_size * self.accumulation))
        return Losses(torch.stack(weighted).sum(), losses)

    @property
    def _num_sources_told(self) -> int:
        """A stage of one source has nothing to tell of each."""
        sources = len(self.stage.sources)
        return sources if self._tells and sources > 1 else 0

    def _add_signs(self, outputs: ForwardOutput, batch: Batch) -> None:
        for objective, term in self.terms.items():
            for name, value in term.signs(outputs, self._read(batch, objective)).items():
                self.signs[name] = self.signs[name] + value if name in self.signs else value

    def _add_by_source(self, outputs: ForwardOutput, batch: Batch) -> None:
        source, sources = batch.source.cpu(), len(self.stage.sources)
        for objective, term in self.terms.items():
            own = source[self._chosen(batch, objective)]
            found = of_each_source(term, outputs, self._read(batch, objective), own, sources)
            self.by_source[objective] = self.by_source.get(objective, torch.zeros_like(found)) + found

    def _report(self, losses: Losses, contrast: Contrast | None) -> dict[str, Tensor]:
        """Losses whose sum over ranks and micro-batches is the global batch's."""
        parts: dict[Objective, Tensor] = {name: loss.detach().float() for name, loss in losses.by_objective.items()}
        if contrast is not None:
            parts["itc"] = contrast.loss / (self.collectives.world_size * self.accumulation)
        total = torch.stack([self.weights[name] * loss for name, loss in parts.items()]).sum()
        return {"loss": total} | {str(name): loss for name, loss in parts.items()}


def accumulation(batch: int, world_size: int, micro_batch_size: int | Literal["auto"] | None) -> int:
    """Return the number of micro-batches of every rank: the fewest that respect `micro_batch_size`."""
    assert micro_batch_size != "auto", "made a number before the stage begins (training.micro_batch)"
    largest_share = -(-batch // world_size)
    return 1 if micro_batch_size is None else -(-largest_share // micro_batch_size)


def _merged(one: ForwardInput, other: ForwardInput) -> ForwardInput:
    """What two objectives ask of the same rows, as one pass."""
    members = {f.name: getattr(other, f.name) for f in fields(ForwardInput) if getattr(one, f.name) is None}
    return replace(one, **members, heads=(*one.heads, *other.heads))


def _within(given: Exchanged, place: Tensor) -> Exchanged:
    """Of the exchanged rows, those at the places of one micro-batch."""
    return {
        name: (objective, rows.rows(torch.nonzero(torch.isin(rows.place, place)).flatten()))
        for name, (objective, rows) in given.items()
    }


def _concatenated(outputs: list[ForwardOutput]) -> ForwardOutput:
    """Row features of several micro-batches as one; scales are the same in each."""
    first = outputs[0]
    return {
        name: {
            key: torch.cat([part[name][key] for part in outputs]) if value.dim() else value
            for key, value in first[name].items()
        }
        for name in first
    }
