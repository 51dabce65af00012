"""The results of an evaluation, as `mome evaluate --json` prints them and as MLflow metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.labelled import ClassificationResult, LinearProbeResult, NLVR2Result, VQAResult
from pipeline.evaluation.masked import MaskedLanguage, MaskedTokenPredictions, Reconstruction
from pipeline.evaluation.retrieval import FusedHead, Rankings, Retrieval

COLLAPSED = 0.05  # a matching head with at most this accuracy on one class has learned only the class frequencies


@dataclass(frozen=True)
class MatchingResult:
    """Accuracy of the matching head on every caption with its own image and with one of another `image_id`."""

    accuracy_matched: float
    accuracy_mismatched: float

    @property
    def accuracy(self) -> float:
        return (self.accuracy_matched + self.accuracy_mismatched) / 2

    @property
    def is_collapsed(self) -> bool:
        """Return True if the head gives nearly all pairs the same answer."""
        return min(self.accuracy_matched, self.accuracy_mismatched) < COLLAPSED


@dataclass
class Evaluation:
    """Results on one source, and the tensors behind its report. A member is None where the stage did not train it."""

    source: str
    stage: str
    held_out: EvalPairs
    rankings: Rankings | None = None  # of all images and captions
    retrieval: Retrieval | None = None
    retrieval_by: Literal["itc"] | FusedHead = "itc"  # head whose scores order the candidates
    retrieval_images: int = 0  # number of images that take part
    reranked: Retrieval | None = None
    reranked_best: int = 0  # candidates per query
    itm: MatchingResult | None = None
    mlm: MaskedLanguage | None = None
    # Text-only predictions of earlier stages, by name.
    language_stages: dict[str, MaskedTokenPredictions] = field(default_factory=dict)
    reconstruction: Reconstruction | None = None
    reconstruction_stage: str = ""
    vqa: VQAResult | None = None
    nlvr2: NLVR2Result | None = None
    classification: ClassificationResult | None = None
    zero_shot: ClassificationResult | None = None
    linear_probe: LinearProbeResult | None = None
    trained_on: tuple[str, ...] = ()  # stages that trained on the same shards: the results are then not held out
    checkpoint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the object of `mome evaluate --json`: fractions, null where something was not trained."""
        retrievals: dict[str, dict[str, Any] | None] = {}
        for name, retrieval, more in (
            ("retrieval", self.retrieval, {"by": self.retrieval_by, "images": self.retrieval_images}),
            ("reranked", self.reranked, {"best": self.reranked_best}),
        ):
            retrievals[name] = None
            if retrieval is None:
                continue
            directions = {"image_to_text": retrieval.image_to_text, "text_to_image": retrieval.text_to_image}
            chances = [recall.chance for recall in directions.values()]
            retrievals[name] = {
                **{
                    direction: {f"r{k}": round(fraction, 6) for k, fraction in recall.at.items()}
                    | {"median_rank": recall.median_rank, "mean_rank": round(recall.mean_rank, 2)}
                    for direction, recall in directions.items()
                },
                "chance": {f"r{k}": round(max(chance[k] for chance in chances), 6) for k in chances[0]},
                **more,
            }
        return {
            "pairs": len(self.held_out),
            "captions": len(self.held_out.tokens),
            "skipped": sum(self.held_out.skipped.values()),
            "source": self.source,
            "source_digest": self.held_out.digest,
            "stage": self.stage,
            **retrievals,
            **self._sections(),
            "trained_on": list(self.trained_on),
            "checkpoint": self.checkpoint,
        }

    def metrics(self) -> dict[str, float]:
        """Return the same results flat, as MLflow metrics: `eval/<source>/i2t_r1`, …"""
        metrics = {"pairs": float(len(self.held_out))}
        for prefix, retrieval in (("", self.retrieval), ("reranked_", self.reranked)):
            if retrieval is not None:
                for name, recall in (("i2t", retrieval.image_to_text), ("t2i", retrieval.text_to_image)):
                    metrics |= {f"{prefix}{name}_r{k}": fraction for k, fraction in recall.at.items()}
                    metrics[f"{prefix}{name}_median_rank"] = recall.median_rank
                    metrics[f"{prefix}{name}_mean_rank"] = recall.mean_rank
        for section, values in self._sections().items():
            if section != "reconstruction":
                metrics |= {f"{section}_{k}": v for k, v in (values or {}).items() if isinstance(v, float)}
        for name, predictions in self.language_stages.items():
            metrics[f"mlm_{name}_stage_text_only"] = predictions.accuracy
        if self.reconstruction is not None:
            metrics["reconstruction_error"] = self.reconstruction.error
        return {f"eval/{self.source}/{name}": value for name, value in metrics.items()}

    def _sections(self) -> dict[str, dict[str, Any] | None]:
        """Return the results other than retrieval, by name, rounded."""
        sections: dict[str, dict[str, Any] | None] = {"mlm": None, "itm": None, "reconstruction": None}
        if self.mlm is not None:
            accuracies = {
                "accuracy": self.mlm.own_image,
                "accuracy_other_image": self.mlm.other_image,
                "accuracy_text_only": self.mlm.text_only,
                "language_stage_text_only": next(reversed(self.language_stages.values()), None),
            }
            sections["mlm"] = {
                **{name: None if result is None else result.accuracy for name, result in accuracies.items()},
                "masked_tokens": len(self.mlm.masked.truth()),
            }
        if self.itm is not None:
            sections["itm"] = {"accuracy": self.itm.accuracy, **asdict(self.itm)}
        if self.reconstruction is not None:
            sections["reconstruction"] = {
                "error": self.reconstruction.error,
                "error_without_model": self.reconstruction.error_without_model,
                "stage": self.reconstruction_stage,
            }
        for name in ("vqa", "nlvr2", "classification", "zero_shot", "linear_probe"):
            result = getattr(self, name)
            sections[name] = None if result is None else asdict(result)
        return {
            name: values and {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
            for name, values in sections.items()
        }
