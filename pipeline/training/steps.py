"""One training step over a global batch: its gradient is the same for every ranks x micro-batch x accumulation (C2).

How: every loss is a sum over rows or tokens divided by a count of the whole global batch. The contrastive loss needs
the whole batch's features at once, so each rank gathers them, differentiates the whole loss with respect to them, and
feeds its own rows' feature gradients back into its own backward ("injection"). Under accumulation the features come
from a first forward without gradient, and each micro-batch is then read again with the same drop-path masks.

A step without accumulation makes two engine calls and one backward: the towers, the masked and the true pairs first;
then the negatives, which need the contrastive scores. With accumulation: the towers, then everything per micro-batch.

Which rows and objectives a step reads follows from the step and the rows' places alone, so that all ranks run the same
graph (C3). Shapes: B global batch, n this rank's rows, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.schema import Objective, RunConfig, StageConfig
from pipeline.data.batch import Batch
from pipeline.data.randomness import hash64, uniform_array
from pipeline.models.passes import Outputs, Pass
from pipeline.objectives.contrastive import contrastive_loss
from pipeline.objectives.masked_image import masked_image_loss, mean_colour_targets, pixel_targets
from pipeline.objectives.masked_language import masked_count, masked_language_loss
from pipeline.objectives.matching import draw_negatives, matching_loss
from pipeline.training.collectives import Collectives, share
from pipeline.training.drop_path import drop_path_keeps
from pipeline.training.engine import Engine

FEATURES = (("image", "itc"), ("text", "itc"), ("image", "itc_vl"), ("text", "itc_vl"))
SCALES = ("scale", "scale_vl")


@dataclass(frozen=True)
class Contrast:
    """The whole batch's contrastive loss, and what flows back into this rank's rows."""

    loss: Tensor  # weighted, mean over the global batch
    feature_gradients: list[Tensor]  # one (n, D) for each of FEATURES
    scale_gradients: list[Tensor]
    image: Tensor  # (B, D), detached
    text: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Negatives:
    """Each chosen row's wrong image and wrong text, in the rows' order."""

    image: Tensor  # (m, H, W, 3) uint8
    text: Tensor  # (m, L)
    text_keep: Tensor


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch: what backward is called on, and each objective's share of the global mean."""

    differentiated: Tensor
    by_objective: dict[Objective, Tensor]  # without contrast, whose gradient is injected


class TrainingStep:
    """Computes the losses of global batches and gives the engine their gradient; the caller steps the engine."""

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        stage: StageConfig,
        collectives: Collectives,
    ):
        self.engine = engine
        self.stage = stage
        self.use = config.use_of(stage)
        self.seed = hash64(config.seed, stage.name)
        self.patch_size = config.model.patch_size
        self.collectives = collectives
        self.drop_path_rates = config.model.drop_path_rates
        self.accumulation = accumulation(stage.batch, collectives.world_size, config.engine.micro_batch)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Forward and backward over this rank's rows of one global batch.

        Returns this rank's part of each objective's loss (0-d, detached): their sum over ranks is the loss of the
        global batch, unweighted except in `loss`.
        """
        counts = self._counts(batch)
        device_batch = batch.to(self.collectives.device)
        pieces = [slice(*share(len(batch), k, self.accumulation)) for k in range(self.accumulation)]
        if self.accumulation == 1:
            return self._whole(batch.place, device_batch, counts)
        return self._accumulated(batch.place, device_batch, pieces, counts)

    def _whole(self, place: Tensor, batch: Batch, counts: dict[Objective, Tensor]) -> dict[str, Tensor]:
        outputs = self.engine(self._passes(batch, place))
        contrast = self._contrast(outputs, batch) if "contrastive" in self.stage.objectives else None
        negatives = self._negatives(contrast, batch, place)
        if negatives is not None:
            outputs |= self.engine(self._negative_passes(batch, place, negatives))
        losses = self._losses(outputs, batch, place, counts, contrast, slice(0, len(batch)))
        self.engine.backward(losses.differentiated * self.collectives.world_size, last=True)
        return self._report(losses, contrast)

    def _accumulated(
        self, place: Tensor, batch: Batch, pieces: list[slice], counts: dict[Objective, Tensor]
    ) -> dict[str, Tensor]:
        contrast = None
        if "contrastive" in self.stage.objectives:
            with torch.no_grad():
                towers = [self.engine(self._tower_passes(batch.rows(piece), place[piece])) for piece in pieces]
            contrast = self._contrast(_concatenated(towers), batch)
        negatives = self._negatives(contrast, batch, place)
        total: dict[str, Tensor] = {}
        for k, piece in enumerate(pieces):
            rows, row_places = batch.rows(piece), place[piece]
            passes = self._passes(rows, row_places)
            if negatives is not None:
                passes |= self._negative_passes(rows, row_places, self._negatives_of(negatives, place, piece))
            losses = self._losses(self.engine(passes), rows, row_places, counts, contrast, piece)
            scale = self.collectives.world_size * self.accumulation  # DeepSpeed divides by both
            self.engine.backward(losses.differentiated * scale, last=k == len(pieces) - 1)
            for name, loss in self._report(losses, contrast).items():
                total[name] = total[name] + loss if name in total else loss
        return total

    # ---- what is read

    def _chosen(self, place: Tensor, objective: Objective) -> Tensor:
        """Which rows an objective reads in this step: one in `every`, in turn. Index tensor on the CPU."""
        every = self.stage.objectives[objective].every
        return torch.nonzero((place + self._step) % every == 0).flatten()

    def _num_chosen(self, objective: Objective) -> int:
        """How many rows of the global batch that is."""
        every = self.stage.objectives[objective].every
        first = -self._step % every
        return (self.stage.batch - first + every - 1) // every

    def _counts(self, batch: Batch) -> dict[Objective, Tensor]:
        """What each objective's sum is divided by, over the whole global batch."""
        self._step = batch.step
        device = self.collectives.device
        counts: dict[Objective, Tensor] = {}
        for objective in self.stage.objectives:
            if objective == "masked_language":
                assert batch.mask_labels is not None
                labels = batch.mask_labels[self._chosen(batch.place, objective)]
                count = masked_count(labels).to(device, torch.float32)
                counts[objective] = self.collectives.sum(count).clamp(min=1)
            else:
                terms = self._terms_of_a_row(objective, batch)
                counts[objective] = torch.tensor(float(terms * self._num_chosen(objective)), device=device)
        return counts

    def _terms_of_a_row(self, objective: Objective, batch: Batch) -> int:
        """A pair with its two negatives; the masked patches, equally many in every image; else one."""
        if objective == "masked_image":
            assert batch.patch_positions is not None
            return batch.patch_positions.shape[1]
        return 3 if objective == "matching" else 1

    def _keeps(self, place: Tensor, name: str) -> Tensor | None:
        keeps = drop_path_keeps(self.seed, self._step, place, name, self.drop_path_rates)
        return None if keeps is None else keeps.to(self.collectives.device, non_blocking=True)

    def _tower_passes(self, batch: Batch, place: Tensor) -> dict[str, Pass]:
        return {
            "image": Pass(heads=("itc",), image=batch.image, drop_keep=self._keeps(place, "image")),
            "text": Pass(
                heads=("itc",), text=batch.text, text_keep=batch.text_keep, drop_keep=self._keeps(place, "text")
            ),
        }

    def _passes(self, batch: Batch, place: Tensor) -> dict[str, Pass]:
        """Every pass that needs no negatives."""
        objectives = self.stage.objectives
        passes = self._tower_passes(batch, place) if "contrastive" in objectives else {}
        if "masked_image" in objectives:
            rows = self._chosen(place, "masked_image")
            passes["hidden"] = Pass(
                heads=("masked_image",),
                image=_take(batch.image, rows),
                patch_positions=_take(batch.patch_positions, rows),
                drop_keep=self._keeps(place[rows], "hidden"),
            )
        if "masked_language" in objectives:
            rows = self._chosen(place, "masked_language")
            passes["masked"] = Pass(
                heads=("mlm",),
                image=_take(batch.image, rows) if self.use == "pairs" else None,
                text=_take(batch.masked_text, rows),
                text_keep=_take(batch.text_keep, rows),
                mask_positions=_take(batch.mask_positions, rows),
                drop_keep=self._keeps(place[rows], "masked"),
            )
        if "matching" in objectives:
            rows = self._chosen(place, "matching")
            passes["pair"] = self._fused(
                _take(batch.image, rows), _take(batch.text, rows), _take(batch.text_keep, rows), place[rows], "pair"
            )
        return passes

    def _fused(self, image: Tensor, text: Tensor, keep: Tensor, place: Tensor, name: str) -> Pass:
        return Pass(heads=("itm",), image=image, text=text, text_keep=keep, drop_keep=self._keeps(place, name))

    def _negative_passes(self, batch: Batch, place: Tensor, negatives: Negatives) -> dict[str, Pass]:
        rows = self._chosen(place, "matching")
        image, text, keep = _take(batch.image, rows), _take(batch.text, rows), _take(batch.text_keep, rows)
        return {
            "wrong_image": self._fused(negatives.image, text, keep, place[rows], "wrong_image"),
            "wrong_text": self._fused(image, negatives.text, negatives.text_keep, place[rows], "wrong_text"),
        }

    # ---- the whole batch's contrast and negatives

    def _contrast(self, outputs: Outputs, batch: Batch) -> Contrast:
        """The loss over all B x B pairs, and its gradient for this rank's features (VLMo: mean of the two heads)."""
        size = self.stage.batch
        with torch.enable_grad():
            gathered = [
                self.collectives.gather_rows(outputs[name][head].float(), size).requires_grad_()
                for name, head in FEATURES
            ]
            scales = [outputs["image"][name].detach().float().requires_grad_() for name in SCALES]
            image_id = self.collectives.gather_rows(batch.image_id, size)
            image, text, image_vl, text_vl = gathered
            loss = contrastive_loss(image, text, scales[0], image_id) + contrastive_loss(
                image_vl, text_vl, scales[1], image_id
            )
            loss = loss / (2 * size) * self.stage.objectives["contrastive"].weight
            gradients = torch.autograd.grad(loss, [*gathered, *scales])
        start, stop = share(size, self.collectives.rank, self.collectives.world_size)
        return Contrast(
            loss=loss.detach(),
            feature_gradients=[gradient[start:stop] for gradient in gradients[:4]],
            scale_gradients=list(gradients[4:]),
            image=image.detach(),
            text=text.detach(),
            scale=scales[0].detach(),
        )

    def _injected(self, outputs: Outputs, contrast: Contrast, piece: slice) -> Tensor:
        """A scalar whose gradient in this rank's rows is the whole batch's contrastive gradient."""
        features = [outputs[name][head].float() for name, head in FEATURES]
        gradients = [gradient[piece] for gradient in contrast.feature_gradients]
        rows = torch.stack([(f * g).sum() for f, g in zip(features, gradients, strict=True)]).sum()
        parts = self.collectives.world_size * self.accumulation  # every one of them adds the whole scale gradient
        scales = [outputs["image"][n].float() * g for n, g in zip(SCALES, contrast.scale_gradients, strict=True)]
        return rows + torch.stack(scales).sum() / parts

    def _negatives(self, contrast: Contrast | None, batch: Batch, place: Tensor) -> Negatives | None:
        """Hard negatives from the whole global batch, drawn by counter (VLMo: probability ∝ softmax of the scores)."""
        if "matching" not in self.stage.objectives:
            return None
        image, text, keep = _present(batch.image), _present(batch.text), _present(batch.text_keep)
        assert contrast is not None, "the schema lets no stage match without contrast"
        size, device = self.stage.batch, self.collectives.device
        ids = self.collectives.gather_rows(batch.image_id, size)
        rows = self._chosen(place, "matching")
        own = place[rows].to(device)

        def draw(queries: Tensor, candidates: Tensor, purpose: str) -> Tensor:
            uniform = uniform_array(hash64(self.seed, self._step, purpose), place[rows].numpy())
            scores = contrast.scale * queries[own] @ candidates.T
            return draw_negatives(scores, ids[own], ids, torch.from_numpy(uniform).to(device, torch.float32))

        wanted = torch.full((len(place),), -1, dtype=torch.int64)
        wanted[rows] = draw(contrast.text, contrast.image, "negative image").cpu()
        wrong_text = draw(contrast.image, contrast.text, "negative text")
        return Negatives(
            image=self.collectives.fetch_rows(image, wanted, size),
            text=self.collectives.gather_rows(self._full_length(text, 0), size)[wrong_text],
            text_keep=self.collectives.gather_rows(self._full_length(keep, False), size)[wrong_text],
        )

    def _negatives_of(self, negatives: Negatives, place: Tensor, piece: slice) -> Negatives:
        """The negatives of one micro-batch's chosen rows."""
        rows = self._chosen(place, "matching")
        which = torch.nonzero((rows >= piece.start) & (rows < piece.stop)).flatten().to(negatives.image.device)
        return Negatives(negatives.image[which], negatives.text[which], negatives.text_keep[which])

    def _full_length(self, text: Tensor, fill: int | bool) -> Tensor:
        """Captions padded to the stage's longest, so that all ranks gather equal shapes."""
        padded = text.new_full((len(text), self.stage.max_text), fill)
        padded[:, : text.shape[1]] = text
        return padded

    # ---- losses

    def _losses(
        self,
        outputs: Outputs,
        batch: Batch,
        place: Tensor,
        counts: dict[Objective, Tensor],
        contrast: Contrast | None,
        piece: slice,
    ) -> Losses:
        losses: dict[Objective, Tensor] = {}
        if "masked_image" in counts:
            rows = self._chosen(place, "masked_image")
            predictions = outputs["hidden"]["masked_image"]
            image, positions = _take(batch.image, rows), _take(batch.patch_positions, rows)
            losses["masked_image"] = masked_image_loss(predictions, self._image_targets(image, positions))
        if "masked_language" in counts:
            labels = _take(batch.mask_labels, self._chosen(place, "masked_language"))
            losses["masked_language"] = masked_language_loss(outputs["masked"]["mlm"], labels)
        if "matching" in counts:
            logits = [outputs[name]["itm"] for name in ("pair", "wrong_image", "wrong_text")]
            matched = torch.cat([torch.full((len(part),), part is logits[0]) for part in logits])
            losses["matching"] = matching_loss(torch.cat(logits), matched.to(logits[0].device))
        losses = {name: loss / counts[name] for name, loss in losses.items()}
        weighted = [self.stage.objectives[name].weight * loss for name, loss in losses.items()]
        if contrast is not None:
            weighted.append(self._injected(outputs, contrast, piece))
        return Losses(torch.stack(weighted).sum(), losses)

    def _image_targets(self, image: Tensor, positions: Tensor) -> Tensor:
        targets = mean_colour_targets if self.stage.image_target == "mean_colour" else pixel_targets
        return targets(image, positions, self.patch_size)

    def _report(self, losses: Losses, contrast: Contrast | None) -> dict[str, Tensor]:
        """Losses whose sum over ranks and micro-batches is the global batch's."""
        objectives = self.stage.objectives
        parts: dict[Objective, Tensor] = {name: loss.detach().float() for name, loss in losses.by_objective.items()}
        if contrast is not None:
            whole = contrast.loss / objectives["contrastive"].weight
            parts["contrastive"] = whole / (self.collectives.world_size * self.accumulation)
        total = torch.stack([objectives[name].weight * loss for name, loss in parts.items()]).sum()
        return {"loss": total} | {str(name): loss for name, loss in parts.items()}


def accumulation(batch: int, world_size: int, micro_batch: int | None) -> int:
    """Micro-batches a rank cuts its rows into, equally many on every rank: the fewest that respect `micro_batch`."""
    largest_share = -(-batch // world_size)
    return 1 if micro_batch is None else -(-largest_share // micro_batch)


def _take(tensor: Tensor | None, rows: Tensor) -> Tensor:
    tensor = _present(tensor)
    return tensor[rows.to(tensor.device, non_blocking=True)]


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the loader prepares what the stage's objectives read"
    return tensor


def _concatenated(outputs: list[Outputs]) -> Outputs:
    """Row features of several micro-batches as one; scales are the same in each."""
    first = outputs[0]
    return {
        name: {
            key: torch.cat([part[name][key] for part in outputs]) if value.dim() else value
            for key, value in first[name].items()
        }
        for name in first
    }
