"""Objectives as terms of the step's loss: each says what it reads of the batch, and sums its loss over what it read.

A term gets the rows that it reads in this step, and divides nothing: the step divides by the whole global batch's
counts (contract C2). Contrast is no term: its loss needs all ranks' features at once (see `contrast`). Terms of one
stage may name the same pass; it is then read once, with the heads of both.

Shapes: n rows, B global batch, K masked places a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import Objective, StageConfig, Use
from pipeline.data.batch import Batch
from pipeline.data.randomness import hash64, uniform_array
from pipeline.models.passes import Head, Outputs, Pass, Regions, left_out
from pipeline.models.vilt import on_canvas
from pipeline.objectives.answering import answering_loss
from pipeline.objectives.classification import classification_loss
from pipeline.objectives.masked_image import masked_image_loss, mean_colour_targets, pixel_targets
from pipeline.objectives.masked_language import masked_count, masked_language_loss
from pipeline.objectives.matching import draw_negatives, matching_loss
from pipeline.objectives.ranking import draw_wrong, ranking_loss
from pipeline.objectives.reasoning import reasoning_loss
from pipeline.objectives.regions import masked_region_count, region_class_loss, region_features_loss
from pipeline.objectives.word_patch import word_patch_loss
from pipeline.training.exchange import TEXT, VISUAL, Exchange

ImageTokenizer = Callable[[Tensor, int], Tensor]  # pictures (n, H, W, 3) uint8 and a grid's side -> (n, P) tokens
Keeps = Callable[[Batch, str], Tensor | None]


@dataclass(frozen=True)
class Setting:
    """What a stage's terms share."""

    stage: StageConfig
    use: Use
    seed: int  # of the stage's own draws
    patch_size: int
    image_tokenizer: ImageTokenizer | None  # of a stage whose masked patches are named by visual tokens
    keeps: Keeps  # rows and a pass's name -> the branches that drop path keeps


@dataclass(frozen=True)
class Candidates:
    """What negatives are drawn from: all rows of the global batch."""

    image_id: Tensor  # (B,)
    source: Tensor  # (B,)
    image: Tensor | None = None  # (B, D) unit vectors of the contrast, detached, where the stage has one
    text: Tensor | None = None
    scale: Tensor | None = None


class Term:
    """One objective. `rows` are those that it reads in this step."""

    def __init__(self, setting: Setting):
        self.setting, self.stage = setting, setting.stage

    def count(self, rows: Batch) -> Tensor | int:
        """How many summands these rows add to the loss."""
        return len(rows)

    def passes(self, rows: Batch) -> dict[str, Pass]:
        """What it reads of the rows as they are."""
        return {}

    def exchanges(self, rows: Batch, candidates: Candidates) -> dict[str, list[Exchange]]:
        """What it reads of rows with another row's picture or text, by the name of the pass."""
        return {}

    def exchanged_pass(self, rows: Batch, name: str) -> Pass:
        """The pass over rows that were exchanged as asked."""
        raise NotImplementedError(f"{type(self).__name__} asked for no exchange")

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        """Summed over the rows."""
        raise NotImplementedError

    def fused(self, rows: Batch, name: str, *heads: Head) -> Pass:
        """Text and picture, or text and regions, read together."""
        return Pass(
            heads=heads,
            image=rows.image,
            image_size=rows.image_size,
            patches_read=rows.patches_read,
            regions=regions_of(rows),
            text=rows.text,
            text_keep=rows.text_keep,
            drop_keep=self.setting.keeps(rows, name),
        )


class MaskedLanguage(Term):
    """Masked words, read beside their picture or regions where the source has them."""

    def count(self, rows: Batch) -> Tensor:
        return masked_count(_present(rows.mask_labels))

    def passes(self, rows: Batch) -> dict[str, Pass]:
        fused = self.fused(rows, "masked", "mlm")
        if self.setting.use == "text":
            fused = replace(fused, image=None, image_size=None, patches_read=None)
        masked = replace(
            fused,
            text=_present(rows.masked_text),
            mask_positions=_present(rows.mask_positions),
            regions=regions_of(rows, hidden=True),
        )
        return {"masked": masked}

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        return masked_language_loss(outputs["masked"]["mlm"], _present(rows.mask_labels))


class MaskedImage(Term):
    """Masked patches of pictures: covered, or left out of the encoder where there is a decoder.

    Pictures are read by themselves; those that keep their shape (ViLT) beside their text, where the source has one.
    """

    def count(self, rows: Batch) -> Tensor | int:
        positions = _present(rows.patch_positions)
        return positions.numel() if rows.image_size is None else (positions >= 0).sum()

    def passes(self, rows: Batch) -> dict[str, Pass]:
        one = Pass(
            heads=("masked_image",),
            image=_present(rows.image),
            image_size=rows.image_size,
            patches_read=rows.patches_read,
            patch_positions=_present(rows.patch_positions),
            patch_stand_ins=rows.patch_stand_ins,
            drop_keep=self.setting.keeps(rows, "hidden"),
        )
        if rows.image_size is not None:
            one = replace(one, text=rows.text, text_keep=rows.text_keep)
        return {"hidden": one if self.stage.image_decoder is None else left_out(one, self._grid(rows) ** 2)}

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        is_masked = None if rows.image_size is None else _present(rows.patch_positions) >= 0
        return masked_image_loss(outputs["hidden"]["masked_image"], self._targets(rows), is_masked)

    def _targets(self, rows: Batch) -> Tensor:
        """What stands at the masked patches: (n, K) classes or tokens, or (n, K, p * p * 3) pixels."""
        image, positions = _present(rows.image), _present(rows.patch_positions)
        if rows.image_size is not None:
            size = self.setting.patch_size
            grid = torch.div(rows.image_size, size, rounding_mode="floor")
            positions = on_canvas(positions.clamp(min=0), grid, image.shape[2] // size)
        if self.stage.image_target == "visual_tokens":
            tokenizer = self.setting.image_tokenizer
            assert tokenizer is not None, "the loop loads the tokenizer that the stage names"
            return tokenizer(image, self._grid(rows)).gather(1, positions)
        targets = mean_colour_targets if self.stage.image_target == "mean_colour" else pixel_targets
        return targets(image, positions, self.setting.patch_size)

    def _grid(self, rows: Batch) -> int:
        return _present(rows.image).shape[1] // self.setting.patch_size


class Classification(Term):
    """The class of each picture."""

    def passes(self, rows: Batch) -> dict[str, Pass]:
        keeps = self.setting.keeps(rows, "labelled")
        return {"labelled": Pass(heads=("classes",), image=_present(rows.image), drop_keep=keeps)}

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        return classification_loss(outputs["labelled"]["classes"], _present(rows.label))


class HardMatching(Term):
    """Each pair, its text with a wrong picture, and its picture with a wrong text, both drawn by contrastive score."""

    def count(self, rows: Batch) -> int:
        return 3 * len(rows)

    def passes(self, rows: Batch) -> dict[str, Pass]:
        return {"pair": self.fused(rows, "pair", "itm")}

    def exchanges(self, rows: Batch, candidates: Candidates) -> dict[str, list[Exchange]]:
        image, text, scale = _present(candidates.image), _present(candidates.text), _present(candidates.scale)
        own = rows.place.to(image.device)

        def draw(queries: Tensor, others: Tensor, purpose: str) -> Tensor:
            scores = scale * queries[own] @ others.T
            return draw_negatives(
                scores, candidates.image_id[own], candidates.image_id, self._uniform(rows, purpose, image.device)
            )

        return {
            "wrong_image": [Exchange(VISUAL, draw(text, image, "negative image"))],
            "wrong_text": [Exchange(TEXT, draw(image, text, "negative text"))],
        }

    def exchanged_pass(self, rows: Batch, name: str) -> Pass:
        return self.fused(rows, name, "itm")

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        logits = [outputs[name]["itm"] for name in ("pair", "wrong_image", "wrong_text")]
        matched = torch.cat([torch.full((len(part),), part is logits[0]) for part in logits])
        return matching_loss(torch.cat(logits), matched.to(logits[0].device))

    def _uniform(self, rows: Batch, purpose: str, device: torch.device) -> Tensor:
        return uniform_of(self.setting.seed, rows, purpose, device)


class RandomMatching(Term):
    """Every second row with the picture of another row of its source (ViLT), the others as they are.

    Rows with regions get another row's regions or another row's caption, half each (ImageBERT).
    """

    def exchanges(self, rows: Batch, candidates: Candidates) -> dict[str, list[Exchange]]:
        wrong = ~matched_rows(rows, self.stage)
        other = draw_of_source(self.setting.seed, rows, candidates, "random negative").cpu()
        nobody = torch.full_like(other, -1)
        if self.setting.use != "regions":
            return {"pair": [Exchange(VISUAL, torch.where(wrong, other, nobody))]}
        by_text = uniform_of(self.setting.seed, rows, "which is wrong", torch.device("cpu")) < 0.5
        return {
            "pair": [
                Exchange(VISUAL, torch.where(wrong & ~by_text, other, nobody)),
                Exchange(TEXT, torch.where(wrong & by_text, other, nobody)),
            ]
        }

    def exchanged_pass(self, rows: Batch, name: str) -> Pass:
        aligned: tuple[Head, ...] = ("alignment",) if "word_patch" in self.stage.objectives else ()
        return self.fused(rows, name, "itm", *aligned)

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        logits = outputs["pair"]["itm"]
        return matching_loss(logits, matched_rows(rows, self.stage).to(logits.device))


class WordPatch(Term):
    """Words and patches of the pairs that random matching reads, drawn together where they match (ViLT)."""

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        aligned = {name: outputs["pair"][name] for name in ("words", "patches", "words_keep", "patches_keep")}
        return word_patch_loss(**aligned, matched=matched_rows(rows, self.stage).to(aligned["words"].device))


class Ranking(Term):
    """Each picture with its own text and with wrong ones of the global batch, which it shall score lower (ViLT)."""

    def passes(self, rows: Batch) -> dict[str, Pass]:
        return {"ranked": self.fused(rows, "ranked", "ranking")}

    def exchanges(self, rows: Batch, candidates: Candidates) -> dict[str, list[Exchange]]:
        own, size = rows.place.numpy(), len(candidates.image_id)
        pairs = own[:, None] * size + np.arange(size)
        keys = torch.from_numpy(uniform_array(hash64(self.setting.seed, rows.step, "wrong texts"), pairs))
        image_id = candidates.image_id.cpu()
        wrong = draw_wrong(keys, image_id[rows.place], image_id, self.stage.wrong_texts)
        return {f"wrong_text_{k}": [Exchange(TEXT, wrong[:, k])] for k in range(self.stage.wrong_texts)}

    def exchanged_pass(self, rows: Batch, name: str) -> Pass:
        return self.fused(rows, name, "ranking")

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        names = ["ranked", *(f"wrong_text_{k}" for k in range(self.stage.wrong_texts))]
        return ranking_loss(torch.stack([outputs[name]["ranking"] for name in names], dim=1))


class Answering(Term):
    """Questions about a picture, with soft targets."""

    def passes(self, rows: Batch) -> dict[str, Pass]:
        return {"question": self.fused(rows, "question", "answers")}

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        return answering_loss(outputs["question"]["answers"], _present(rows.answers), _present(rows.answer_scores))


class Reasoning(Term):
    """Statements about two pictures, each read with the statement."""

    def passes(self, rows: Batch) -> dict[str, Pass]:
        first = self.fused(rows, "statement", "reasoning")
        both = replace(first, second_image=rows.second_image, second_image_size=rows.second_image_size)
        return {"statement": both}

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        return reasoning_loss(outputs["statement"]["reasoning"], _present(rows.label))


def matched_rows(rows: Batch, stage: StageConfig) -> Tensor:
    """Which rows random matching reads as true pairs: every second of those that it reads; (n,) bool, on the CPU."""
    every = stage.objectives["matching"].every
    return torch.div(rows.place + rows.step, every, rounding_mode="floor") % 2 == 0


def draw_of_source(seed: int, rows: Batch, candidates: Candidates, purpose: str) -> Tensor:
    """For each row the place of another row of its source that shows another image: (n,) int64.

    Where the global batch has no such row, any row that shows another image.
    """
    own = rows.place.to(candidates.source.device)
    same = candidates.source[own, None] == candidates.source[None, :]
    scores = torch.where(same, 0.0, float("-inf"))
    uniform = uniform_of(seed, rows, purpose, scores.device)
    return draw_negatives(scores, candidates.image_id[own], candidates.image_id, uniform)


def uniform_of(seed: int, rows: Batch, purpose: str, device: torch.device) -> Tensor:
    """A number in [0, 1) for each row: (n,) float32, decided by the step, the row's place and the purpose."""
    drawn = uniform_array(hash64(seed, rows.step, purpose), rows.place.numpy())
    return torch.from_numpy(drawn).to(device, torch.float32)


def regions_of(rows: Batch, hidden: bool = False) -> Regions | None:
    """The rows' regions, the masked ones zeroed if `hidden`; None where the source has none."""
    if rows.region_features is None:
        return None
    features = rows.region_features
    if hidden and rows.region_hidden is not None:
        features = features.masked_fill(rows.region_hidden.unsqueeze(-1), 0.0)
    return Regions(features, _present(rows.region_location), _present(rows.region_keep))


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the loader prepares what the stage's objectives read"
    return tensor


class _MaskedRegions(Term):
    """What is asked at masked regions, beside masked words where the stage learns these too: both share one pass."""

    head: ClassVar[Head]

    def count(self, rows: Batch) -> Tensor:
        return masked_region_count(_present(rows.region_positions))

    def passes(self, rows: Batch) -> dict[str, Pass]:
        masked = replace(
            self.fused(rows, "masked", self.head),
            text=rows.text if rows.masked_text is None else rows.masked_text,
            regions=regions_of(rows, hidden=True),
            region_positions=_present(rows.region_positions),
        )
        return {"masked": masked}


class RegionClass(_MaskedRegions):
    """The detector's class of masked regions (MOC)."""

    head = "region_class"

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        logits = outputs["masked"][self.head]
        return region_class_loss(logits, _present(rows.region_class), _present(rows.region_positions))


class RegionFeatures(_MaskedRegions):
    """The feature vectors of masked regions (MRFR)."""

    head = "region_features"

    def loss(self, outputs: Outputs, rows: Batch) -> Tensor:
        predicted = outputs["masked"][self.head]
        return region_features_loss(predicted, _present(rows.region_features), _present(rows.region_positions))


TERMS: dict[Objective, type[Term]] = {
    "masked_language": MaskedLanguage,
    "masked_image": MaskedImage,
    "classification": Classification,
    "region_class": RegionClass,
    "region_features": RegionFeatures,
    "word_patch": WordPatch,
    "ranking": Ranking,
    "answering": Answering,
    "reasoning": Reasoning,
}


def terms_of(setting: Setting) -> dict[Objective, Term]:
    """The terms of a stage, in the objectives' own order, which all ranks share."""
    chosen: dict[Objective, Term] = {}
    for objective in get_args(Objective):
        if objective == "contrastive" or objective not in setting.stage.objectives:
            continue
        kind = TERMS.get(objective)
        if objective == "matching":
            kind = HardMatching if setting.stage.negatives == "hard" else RandomMatching
        assert kind is not None, f"objective {objective} has no term"
        chosen[objective] = kind(setting)
    return chosen
