"""What an evaluation found, and the shapes in which it is told: `mome evaluate --json`, MLflow's metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.evaluation.classification import ClassificationResult, LinearProbeResult
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.masked_image import Reconstruction
from pipeline.evaluation.masked_language import MaskedLanguage, MaskedTokenPredictions
from pipeline.evaluation.retrieval import FusedHead, Rankings, Recall, Retrieval
from pipeline.evaluation.vqa_nlvr2 import NLVR2Result, VQAResult

Figures = VQAResult | NLVR2Result | ClassificationResult | LinearProbeResult
COLLAPSED = 0.05  # a matching head that is right in no more of one class has learnt only how often pairs match


@dataclass(frozen=True)
class MatchingResult:
    """The matching head on every caption with its own image and with another one (never the same `image_id`)."""

    accuracy_matched: float
    accuracy_mismatched: float

    @property
    def accuracy(self) -> float:
        return (self.accuracy_matched + self.accuracy_mismatched) / 2

    @property
    def is_collapsed(self) -> bool:
        """Whether the head gives nearly everything the same answer, as it does where it learnt nothing of pairs."""
        return min(self.accuracy_matched, self.accuracy_mismatched) < COLLAPSED


@dataclass(frozen=True)
class Evaluation:
    """Results on one source, and what a report shows of them. A member is None where the stage did not train it."""

    source: str
    stage: str
    held_out: EvalPairs
    rankings: Rankings | None = None  # of all images and captions
    retrieval: Retrieval | None = None
    retrieval_by: Literal["itc"] | FusedHead = "itc"  # the head whose scores order the candidates
    retrieval_images: int = 0  # that take part in it
    reranked: Retrieval | None = None
    reranked_best: int = 0  # candidates a query
    matching: MatchingResult | None = None
    mlm: MaskedLanguage | None = None
    language_stages: dict[str, MaskedTokenPredictions] = field(
        default_factory=dict
    )  # text-only guesses of earlier stages, by name
    reconstruction: Reconstruction | None = None
    reconstruction_stage: str = ""
    answering: VQAResult | None = None
    reasoning: NLVR2Result | None = None
    classification: ClassificationResult | None = None
    zero_shot: ClassificationResult | None = None
    linear_probe: LinearProbeResult | None = None
    trained_on: tuple[str, ...] = ()  # stages that read the same shards: then this is no held-out result
    checkpoint: str = ""
    report: str = ""

    def located(self, checkpoint: str = "", report: str = "") -> Evaluation:
        """The same, told where the checkpoint came from and where the report went."""
        return replace(self, checkpoint=checkpoint or self.checkpoint, report=report or self.report)

    def to_json(self) -> dict[str, Any]:
        """The shape that `mome evaluate --json` promises: fractions, null where something was not trained."""
        return {
            "pairs": len(self.held_out),
            "captions": len(self.held_out.tokens),
            "skipped": sum(self.held_out.skipped.values()),
            "source": self.source,
            "source_digest": self.held_out.digest,
            "stage": self.stage,
            "retrieval": _retrieval_json(self.retrieval, by=self.retrieval_by, images=self.retrieval_images),
            "reranked": _retrieval_json(self.reranked, best=self.reranked_best),
            "mlm": self._mlm_json(),
            "itm": self._itm_json(),
            "reconstruction": self._reconstruction_json(),
            **{name: _figures(figures) for name, figures in self.annotated.items()},
            "trained_on": list(self.trained_on),
            "checkpoint": self.checkpoint,
            "report": self.report,
        }

    @property
    def annotated(self) -> dict[str, Figures | None]:
        """What sources of questions, statements and labelled pictures are measured by."""
        return {
            "vqa": self.answering,
            "nlvr2": self.reasoning,
            "classification": self.classification,
            "zero_shot": self.zero_shot,
            "linear_probe": self.linear_probe,
        }

    def metrics(self) -> dict[str, float]:
        """The same figures flat, as MLflow logs them: `eval/<source>/i2t_r1`, …"""
        found: dict[str, float | None] = {"pairs": float(len(self.held_out))}
        for prefix, retrieval in (("", self.retrieval), ("reranked_", self.reranked)):
            if retrieval is not None:
                found |= _retrieval_metrics(prefix, retrieval)
        for prefix, section in (("mlm_", self._mlm_json()), ("itm_", self._itm_json())):
            found |= {prefix + name: value for name, value in (section or {}).items() if isinstance(value, float)}
        for name, guesses in self.language_stages.items():
            found[f"mlm_{name}_stage_text_only"] = guesses.accuracy
        for name, figures in self.annotated.items():
            section = _figures(figures) or {}
            found |= {f"{name}_{key}": value for key, value in section.items() if isinstance(value, float)}
        if self.reconstruction is not None:
            found["reconstruction_error"] = self.reconstruction.error
        return {f"eval/{self.source}/{name}": value for name, value in found.items() if value is not None}

    def _mlm_json(self) -> dict[str, Any] | None:
        if self.mlm is None:
            return None
        return {
            "accuracy": _accuracy(self.mlm.own_image),
            "accuracy_other_image": _accuracy(self.mlm.other_image),
            "accuracy_text_only": _accuracy(self.mlm.text_only),
            "language_stage_text_only": _accuracy(next(reversed(self.language_stages.values()), None)),
            "masked_tokens": len(self.mlm.masked.truth()),
        }

    def _itm_json(self) -> dict[str, Any] | None:
        if self.matching is None:
            return None
        return {
            "accuracy": _rounded(self.matching.accuracy),
            "accuracy_matched": _rounded(self.matching.accuracy_matched),
            "accuracy_mismatched": _rounded(self.matching.accuracy_mismatched),
        }

    def _reconstruction_json(self) -> dict[str, Any] | None:
        if self.reconstruction is None:
            return None
        return {
            "error": _rounded(self.reconstruction.error),
            "error_without_model": _rounded(self.reconstruction.error_without_model),
            "stage": self.reconstruction_stage,
        }


def _accuracy(guesses: MaskedTokenPredictions | None) -> float | None:
    return None if guesses is None else _rounded(guesses.accuracy)


def _figures(figures: Figures | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    return {name: _rounded(value) if isinstance(value, float) else value for name, value in asdict(figures).items()}


def _rounded(fraction: float) -> float:
    return round(fraction, 6)


def _retrieval_json(retrieval: Retrieval | None, **more: Any) -> dict[str, Any] | None:
    if retrieval is None:
        return None
    return {
        "image_to_text": _recall_json(retrieval.image_to_text),
        "text_to_image": _recall_json(retrieval.text_to_image),
        "chance": {f"r{k}": _rounded(share) for k, share in retrieval.chance().items()},
        **more,
    }


def _recall_json(recall: Recall) -> dict[str, float]:
    return {f"r{k}": _rounded(share) for k, share in recall.at.items()} | {
        "median_rank": recall.median_rank,
        "mean_rank": round(recall.mean_rank, 2),
    }


def _retrieval_metrics(prefix: str, retrieval: Retrieval) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, recall in (("i2t", retrieval.image_to_text), ("t2i", retrieval.text_to_image)):
        found |= {f"{prefix}{name}_r{k}": share for k, share in recall.at.items()}
        found |= {f"{prefix}{name}_median_rank": recall.median_rank, f"{prefix}{name}_mean_rank": recall.mean_rank}
    return found
