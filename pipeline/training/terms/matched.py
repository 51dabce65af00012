"""Pairs against wrong ones: matching with hard or random negatives, word-patch alignment, and ranking.

Shapes: n rows, B global batch, D feature width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import StageConfig
from pipeline.data.batch import Batch
from pipeline.data.randomness import hash64, uniform_array
from pipeline.models.forward import ForwardInput, ForwardOutput, Head
from pipeline.objectives.matching import draw_negatives, matching_loss
from pipeline.objectives.ranking import draw_wrong, ranking_loss
from pipeline.objectives.word_patch import word_patch_loss
from pipeline.training.exchange import TEXT, VISUAL, Exchange
from pipeline.training.terms.term import Candidates, Term, present, uniform_of


class HardMatching(Term):
    """Each pair, its text with a wrong picture, and its picture with a wrong text, both drawn by contrastive score."""

    def count(self, rows: Batch) -> int:
        return 3 * len(rows)

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        return {"pair": self.fused(rows, "pair", "itm")}

    def exchanges(self, rows: Batch, candidates: Candidates) -> dict[str, list[Exchange]]:
        image, text, scale = present(candidates.image), present(candidates.text), present(candidates.scale)
        own = rows.place.to(image.device)

        def draw(queries: Tensor, others: Tensor, purpose: str) -> Tensor:
            scores = scale * queries[own] @ others.T
            uniform = uniform_of(self.setting.seed, rows, purpose, image.device)
            return draw_negatives(scores, candidates.image_id[own], candidates.image_id, uniform)

        return {
            "wrong_image": [Exchange(VISUAL, draw(text, image, "negative image"))],
            "wrong_text": [Exchange(TEXT, draw(image, text, "negative text"))],
        }

    def exchanged_pass(self, rows: Batch, name: str) -> ForwardInput:
        return self.fused(rows, name, "itm")

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        return matching_loss(*self._judged(outputs))

    def signs(self, outputs: ForwardOutput, rows: Batch) -> dict[str, Tensor]:
        return matching_signs(*self._judged(outputs))

    def _judged(self, outputs: ForwardOutput) -> tuple[Tensor, Tensor]:
        """Logits (3n, 2), and which of them are of true pairs (3n,)."""
        logits = [outputs[name]["itm"] for name in ("pair", "wrong_image", "wrong_text")]
        matched = torch.cat([torch.full((len(part),), part is logits[0]) for part in logits])
        return torch.cat(logits), matched.to(logits[0].device)


class RandomMatching(Term):
    """Every second row with the picture of another row of its source (ViLT), the others as they are.

    Rows with regions get another row's regions or another row's caption, half each (ImageBERT).
    """

    def exchanges(self, rows: Batch, candidates: Candidates) -> dict[str, list[Exchange]]:
        wrong = ~matched_rows(rows, self.stage)
        other = draw_of_source(self.setting.seed, rows, candidates, "random negative").cpu()
        nobody = torch.full_like(other, -1)
        if self.setting.source_type != "regions":
            return {"pair": [Exchange(VISUAL, torch.where(wrong, other, nobody))]}
        by_text = uniform_of(self.setting.seed, rows, "which is wrong", torch.device("cpu")) < 0.5
        return {
            "pair": [
                Exchange(VISUAL, torch.where(wrong & ~by_text, other, nobody)),
                Exchange(TEXT, torch.where(wrong & by_text, other, nobody)),
            ]
        }

    def exchanged_pass(self, rows: Batch, name: str) -> ForwardInput:
        aligned: tuple[Head, ...] = ("alignment",) if "wpa" in self.stage.objectives else ()
        return self.fused(rows, name, "itm", *aligned)

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        return matching_loss(*self._judged(outputs, rows))

    def signs(self, outputs: ForwardOutput, rows: Batch) -> dict[str, Tensor]:
        return matching_signs(*self._judged(outputs, rows))

    def _judged(self, outputs: ForwardOutput, rows: Batch) -> tuple[Tensor, Tensor]:
        logits = outputs["pair"]["itm"]
        return logits, matched_rows(rows, self.stage).to(logits.device)


class WordPatch(Term):
    """Words and patches of the pairs that random matching reads, drawn together where they match (ViLT)."""

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        aligned = {name: outputs["pair"][name] for name in ("words", "patches", "words_keep", "patches_keep")}
        return word_patch_loss(**aligned, matched=matched_rows(rows, self.stage).to(aligned["words"].device))


class Ranking(Term):
    """Each picture with its own text and with wrong ones of the global batch, which it shall score lower (ViLT)."""

    def passes(self, rows: Batch) -> dict[str, ForwardInput]:
        return {"ranked": self.fused(rows, "ranked", "ranking")}

    def exchanges(self, rows: Batch, candidates: Candidates) -> dict[str, list[Exchange]]:
        own, size = rows.place.numpy(), len(candidates.image_id)
        pairs = own[:, None] * size + np.arange(size)
        keys = torch.from_numpy(uniform_array(hash64(self.setting.seed, rows.step, "wrong texts"), pairs))
        image_id = candidates.image_id.cpu()
        wrong = draw_wrong(keys, image_id[rows.place], image_id, self.stage.num_negative_texts)
        return {f"wrong_text_{k}": [Exchange(TEXT, wrong[:, k])] for k in range(self.stage.num_negative_texts)}

    def exchanged_pass(self, rows: Batch, name: str) -> ForwardInput:
        return self.fused(rows, name, "ranking")

    def loss(self, outputs: ForwardOutput, rows: Batch) -> Tensor:
        names = ["ranked", *(f"wrong_text_{k}" for k in range(self.stage.num_negative_texts))]
        return ranking_loss(torch.stack([outputs[name]["ranking"] for name in names], dim=1))


def matching_signs(logits: Tensor, matched: Tensor) -> dict[str, Tensor]:
    """Pairs of each class (0-d), and how many of them the head gets right: recalls tell a collapse from learning."""
    said = logits.detach().argmax(dim=1).bool()
    return {
        "itm_matched": matched.sum(),
        "itm_matched_right": (matched & said).sum(),
        "itm_wrong": (~matched).sum(),
        "itm_wrong_right": (~matched & ~said).sum(),
    }


def matched_rows(rows: Batch, stage: StageConfig) -> Tensor:
    """Which rows random matching reads as true pairs: every second of those that it reads; (n,) bool, on the CPU."""
    every = stage.objectives["itm"].every
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
