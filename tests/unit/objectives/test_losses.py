"""Losses that compare a head's output with labels equal their definitions, and the registry's declarations are checked.

Shapes: 6 examples, 7 classes, 4 answers or 2 masked positions of each example, 5 regions.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import objectives
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from pipeline.config.schema import SourceType, objective_names
from pipeline.objectives import cross_entropy
from pipeline.objectives.mim import mim_loss
from pipeline.objectives.moc import moc_loss
from pipeline.objectives.mrfr import mrfr_loss
from pipeline.objectives.vqa import vqa_loss

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
LABEL = torch.tensor([0, 3, 1, 2, 2, 0])
WORDS = torch.tensor([[3, -100], [5, 0], [-100, -100], [6, 6], [2, -100], [1, 4]])
POSITIONS = torch.tensor([[0, 3], [2, -1], [1, -1], [4, 0], [-1, -1], [3, 2]])  # of regions; -1 is padding
MASKED = [(*at, int(POSITIONS[at])) for at in map(tuple, torch.nonzero(POSITIONS >= 0).tolist())]
CLASSES = torch.tensor([[0, 1, 2, 3, 4]]) + torch.tensor([[0], [1], [2], [1], [0], [2]])
ANSWERS = torch.tensor([[2, 0, -1, -1], [-1, -1, -1, -1], [3, 1, 2, 6], [5, 4, -1, -1], [0, 1, 2, 3], [6, -1, -1, -1]])
SCORES = torch.linspace(0, 1, 24).view(6, 4)
SOFT_TARGETS = torch.zeros(6, 7)  # the scores of the answers by number; 0 for those that nobody gave
for example, place in torch.nonzero(ANSWERS >= 0).tolist():
    SOFT_TARGETS[example, ANSWERS[example, place]] = SCORES[example, place]


def normal(*shape: int) -> Tensor:
    return torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))


# The loss, the head's output, its other arguments, and the definition of the sum.
Case = tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...], Callable[..., Tensor]]
CASES: dict[str, Case] = {
    "classes": (cross_entropy, normal(7), (LABEL,), lambda x, y: 6 * F.cross_entropy(x, y)),
    "pairs": (cross_entropy, normal(2), (LABEL > 1,), lambda x, y: -torch.where(y, *x.log_softmax(1).T.flip(0)).sum()),
    "words": (
        cross_entropy, normal(2, 7), (WORDS,), lambda x, y: F.cross_entropy(x[y >= 0], y[y >= 0]) * (y >= 0).sum(),
    ),
    "vqa": (
        vqa_loss, normal(7), (ANSWERS, SCORES),
        lambda x, *_: F.binary_cross_entropy_with_logits(x, SOFT_TARGETS) * 7 * len(x),
    ),
    "mim": (mim_loss, normal(2, 7), (CLASSES[:, :2],), lambda x, y: 12 * F.cross_entropy(x.flatten(0, 1), y.flatten())),
    "moc": (
        moc_loss, normal(2, 7), (CLASSES, POSITIONS),
        lambda x, classes, _: sum(F.cross_entropy(x[b, k], classes[b, r]) for b, k, r in MASKED),
    ),
    "mrfr": (
        mrfr_loss, normal(2, 8), (normal(5, 8) + 1, POSITIONS),
        lambda x, features, _: sum((x[b, k] - features[b, r]).norm() ** 2 for b, k, r in MASKED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_equals_its_definition_and_is_the_sum_over_parts(case: Case) -> None:
    loss, output, labels, definition = case
    torch.testing.assert_close(loss(output, *labels), definition(output, *labels))
    parts = [loss(*(t[rows] for t in (output, *labels))) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    torch.testing.assert_close(torch.stack(parts).sum(), loss(output, *labels))
    total = loss(output[:0].clone().requires_grad_(), *(t[:0] for t in labels))
    total.backward()  # every rank takes part in the backward
    assert total == 0


@pytest.mark.parametrize(
    ("name", "padding"), [("vqa", (-1, 0.7)), ("words", (-100,)), ("moc", (None, -1)), ("mrfr", (None, -1))]
)
def test_padding_adds_neither_loss_nor_gradient(name: str, padding: tuple[float | None, ...]) -> None:
    loss, output, labels, _ = CASES[name]
    wider = (output.clone() if name == "vqa" else F.pad(output, (0, 0, 0, 3), value=7.0)).requires_grad_()
    longer = [t if value is None else F.pad(t, (0, 3), value=value) for t, value in zip(labels, padding, strict=True)]
    total = loss(wider, *longer)
    torch.testing.assert_close(total, loss(output, *labels))
    total.backward()
    assert name == "vqa" or not wider.grad[:, 2:].any()  # type: ignore[index]


def test_every_module_registers_an_objective_which_the_schema_knows_without_torch() -> None:
    kinds = {name: objectives.objective_type(name) for name in objective_names()}
    assert {name: kind.__module__ for name, kind in kinds.items()} == {n: f"pipeline.objectives.{n}" for n in kinds}
    assert all(kind.source_types for kind in kinds.values())
    code = "import sys, pipeline.config.schema as s; assert s.objective_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.language.objectives={mim: {}}", "mim needs sources of type images or pairs"),
        ("stages.vision_language.objectives={itm: {}}", "add itc, or set negatives: random"),
        ("stages.vision_language.objectives={wpa: {}}", "add itm and set negatives: random"),
        ("stages.vision.image_target=visual_tokens", "image_tokenizer: required"),
        ("stages.vision_language.objectives={wpa: {}, itm: {every: 2}}", "set the same `every` for both"),
        ("evaluation.source=pictures", "expected a source of type pairs, labelled"),
    ],
)
def test_unsupported_objective_is_rejected(override: str, fault: str) -> None:
    negatives = ["stages.vision_language.negatives=random"] if "every" in override else []
    with pytest.raises(ConfigError, match=fault):
        objectives.check_objectives(load_config(DEMO, [override, *negatives]))


def test_evaluations_and_inputs_are_derived_from_source_types() -> None:
    assert objectives.SOURCE_INPUTS.keys() == set(get_args(SourceType))
    assert objectives.evaluated_source_types() == ("pairs", "labelled", "questions", "statements")
    stage = load_config(DEMO).stage_named("vision_language")
    expected = {"pairs": {"retrieval", "matching", "mlm"}, "labelled": {"zero_shot"}, "questions": set()}
    assert {kind: objectives.evaluation_tasks(stage, kind) for kind in expected} == expected
