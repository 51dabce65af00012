"""Losses equal their definitions on any number of ranks, negatives are drawn correctly, and declarations are checked.

Shapes of the cases: 6 examples, 7 classes, 4 answers or 2 masked positions of each example, 5 regions.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline import objectives
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from pipeline.config.schema import OBJECTIVES, SourceType
from pipeline.data.batch import Batch
from pipeline.objectives import NegativePool, ObjectiveContext, cross_entropy
from pipeline.objectives.itc import itc_loss
from pipeline.objectives.itm import ITM, draw_negatives, matched_examples
from pipeline.objectives.mim import mim_loss, patch_targets, patchify, reconstruct, unpatchify
from pipeline.objectives.moc import MOC
from pipeline.objectives.mrfr import MRFR
from pipeline.objectives.vqa import vqa_loss
from pipeline.objectives.wpa import wpa_cost, wpa_loss, wpa_plan
from tests.support.tiny_model import tiny_batch, tiny_config

close = torch.testing.assert_close
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
    "masked tokens": (
        mim_loss, normal(2, 7), (CLASSES[:, :2], POSITIONS >= 0),
        lambda x, y, is_masked: F.cross_entropy(x[is_masked], y[is_masked]) * is_masked.sum(),
    ),
    "masked pixels": (
        mim_loss, normal(2, 8), (normal(2, 8).flip(0), POSITIONS >= 0),
        lambda x, y, is_masked: ((x - y) ** 2).mean(-1)[is_masked].sum(),
    ),
    "moc": (
        MOC.loss_function, normal(2, 7), (CLASSES, POSITIONS),
        lambda x, classes, _: sum(F.cross_entropy(x[b, k], classes[b, r]) for b, k, r in MASKED),
    ),
    "mrfr": (
        MRFR.loss_function, normal(2, 8), (normal(5, 8) + 1, POSITIONS),
        lambda x, features, _: sum((x[b, k] - features[b, r]).norm() ** 2 for b, k, r in MASKED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_equals_its_definition_and_is_the_sum_over_parts(case: Case) -> None:
    loss, output, labels, definition = case
    close(loss(output, *labels), definition(output, *labels))
    parts = [loss(*(t[rows] for t in (output, *labels))) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    close(torch.stack(parts).sum(), loss(output, *labels))
    total = loss(output[:0].clone().requires_grad_(), *(t[:0] for t in labels))
    total.backward()  # every rank takes part in the backward
    assert total == 0


@pytest.mark.parametrize(
    ("name", "padding"),
    [("vqa", (-1, 0.7)), ("words", (-100,)), ("moc", (None, -1)), ("mrfr", (None, -1)), ("masked tokens", (1, 0))],
)
def test_padding_adds_neither_loss_nor_gradient(name: str, padding: tuple[float | None, ...]) -> None:
    loss, output, labels, _ = CASES[name]
    wider = (output.clone() if name == "vqa" else F.pad(output, (0, 0, 0, 3), value=7.0)).requires_grad_()
    longer = [t if value is None else F.pad(t, (0, 3), value=value) for t, value in zip(labels, padding, strict=True)]
    total = loss(wider, *longer)
    close(total, loss(output, *labels))
    total.backward()
    assert name == "vqa" or not wider.grad[:, 2:].any()  # type: ignore[index]


def test_every_module_registers_an_objective_known_without_torch_and_sources_imply_inputs_and_evaluations() -> None:
    kinds = {name: objectives.objective_type(name) for name in OBJECTIVES}
    assert {name: kind.__module__ for name, kind in kinds.items()} == {n: f"pipeline.objectives.{n}" for n in kinds}
    assert all(kind.source_types for kind in kinds.values())
    code = "import sys, pipeline.config.schema as s; assert s.OBJECTIVES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert objectives.SOURCE_INPUTS.keys() == set(get_args(SourceType))
    evaluated = [kind for kind in get_args(SourceType) if objectives.evaluation_tasks(None, kind)]
    assert evaluated == ["pairs", "labelled", "questions", "statements"]
    stage = load_config(DEMO).stage_named("vision_language")
    expected = {"pairs": {"retrieval", "matching", "mlm"}, "labelled": {"zero_shot"}, "questions": set()}
    assert {kind: objectives.evaluation_tasks(stage, kind) for kind in expected} == expected
    with pytest.raises(ConfigError, match="expected a source of type pairs, labelled"):
        objectives.check_objectives(load_config(DEMO, ["evaluation.source=pictures"]))


PAIRS, WIDTH = 12, 6
DISTINCT, REPEATED = torch.arange(PAIRS), torch.tensor([0, 1, 2, 0, 4, 5, 1, 1, 8, 9, 10, 0])


def features() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(PAIRS, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(14.0, requires_grad=True)


def test_itc_of_distinct_images_is_the_plain_symmetric_cross_entropy_on_any_ranks_in_any_order_and_in_float32() -> None:
    image, text, scale = whole = features()
    expected = itc_loss(*whole, REPEATED)
    for ranks in (2, 4):
        cut = features()
        parts = torch.stack([itc_loss(*cut, REPEATED, rows) for rows in DISTINCT.chunk(ranks)]).sum()
        close(parts, expected)
        close(torch.autograd.grad(parts, cut), torch.autograd.grad(expected, whole, retain_graph=True))
    logits = scale * image @ text.T
    plain = F.cross_entropy(logits, DISTINCT, reduction="sum") + F.cross_entropy(logits.T, DISTINCT, reduction="sum")
    close(itc_loss(image, text, scale, DISTINCT), plain / 2)
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(1))
    close(itc_loss(image[order], text[order], scale, REPEATED[order]), expected)
    same = torch.ones(PAIRS, WIDTH) / WIDTH**0.5
    assert itc_loss(same, same, scale, DISTINCT).item() == pytest.approx(PAIRS * math.log(PAIRS), rel=1e-5)
    rounded = [tensor.bfloat16() for tensor in (image, text, scale)]
    loss = itc_loss(*rounded, DISTINCT)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, itc_loss(*(tensor.float() for tensor in rounded), DISTINCT))


def test_trap_03_equal_images_are_never_negatives() -> None:
    (image, text, scale), total = features(), 0.0
    for i in range(PAIRS):
        others = [j for j in range(PAIRS) if j == i or REPEATED[j] != REPEATED[i]]
        for query, candidates in ((image[i], text), (text[i], image)):
            total -= (scale * candidates[others] @ query).log_softmax(0)[others.index(i)].item() / 2
    assert itc_loss(image, text, scale, REPEATED).item() == pytest.approx(total, rel=1e-5)
    of_one_image = itc_loss(image, text, scale, torch.zeros(PAIRS, dtype=torch.int64))
    assert not any(value.any() for value in (of_one_image, *torch.autograd.grad(of_one_image, [image, text])))


def test_negatives_follow_the_softmax_over_other_images_if_it_is_finite_on_any_ranks() -> None:
    image_id, draws = torch.tensor([0, 1, 2, 1, 4, 5]), 20_000
    evenly, row_id = (torch.arange(draws) + 0.5) / draws, torch.ones(draws, dtype=torch.int64)
    for poison in (None, math.nan, math.inf, -math.inf):
        similarity = 3 * normal(6)[:1] if poison is None else torch.full((1, 6), poison)
        drawn = draw_negatives(similarity.expand(draws, -1), row_id, image_id, evenly)
        scores = similarity[0] if poison is None else torch.zeros(6)
        expected = scores.masked_fill(image_id == 1, -math.inf).softmax(0)
        close(torch.bincount(drawn, minlength=6) / draws, expected, rtol=0, atol=1e-4)
    similarity, ids = 3 * normal(24).view(12, 12), torch.arange(12) // 2
    uniform = torch.rand(12, generator=torch.Generator().manual_seed(1))
    parts = zip(similarity.chunk(4), ids.chunk(4), uniform.chunk(4), strict=True)
    drawn = torch.cat([draw_negatives(rows, row_id, ids, numbers) for rows, row_id, numbers in parts])
    assert torch.equal(drawn, draw_negatives(similarity, ids, ids, uniform))


@pytest.mark.parametrize("scale", [0.0, 3.0, 1e30])
def test_trap_02_and_03_equal_image_is_never_drawn_and_confident_rows_still_draw(scale: float) -> None:
    image_id, row_id = torch.arange(50) // 3, torch.arange(40) // 3
    for uniform in (0.0, 0.3, 1 - 2**-24, 1 - 2**-53):
        similarity, draws = scale * normal(40, 50)[0], torch.full((40,), uniform, dtype=torch.float64)
        assert (image_id[draw_negatives(similarity, row_id, image_id, draws)] != row_id).all()
    similarity = torch.tensor([[-1e4, -1e4, 1e4, -1e4]])
    assert draw_negatives(similarity, torch.tensor([2]), torch.arange(4), torch.tensor([0.9])).item() == 3
    drawn = draw_negatives(scale * normal(3)[:3], torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 0.5, 0.999]))
    assert ((drawn >= 0) & (drawn < 3)).all(), "a batch of one image draws among all"


def test_random_negative_has_the_same_source_and_another_image_whatever_else_the_rank_reads() -> None:
    batch, stage = tiny_batch(tiny_config(), 3, 0, 1, 12), tiny_config().stages[3]

    def random_negatives(seed: int, examples: Batch, source: Tensor = batch.source) -> Tensor:
        """Return the examples whose image replaces each example's; -1 where a pair stays matched."""
        objective = ITM(ObjectiveContext(stage, "pairs", seed, 8, None, lambda *_: None))
        return objective.swaps(examples, NegativePool(batch.image_id, source))["pair"][0].places

    drawn = torch.stack([random_negatives(seed, batch) for seed in range(200)])
    is_matched = matched_examples(batch, stage)
    assert (drawn[:, is_matched] == -1).all()
    for row in torch.nonzero(~is_matched).flatten():
        allowed = (batch.source == batch.source[row]) & (batch.image_id != batch.image_id[row])
        assert set(drawn[:, row].tolist()) == set(torch.nonzero(allowed).flatten().tolist())
        alone = torch.ones(12, dtype=torch.int64).index_fill(0, row, 7)
        assert random_negatives(1, batch, alone)[row] not in (-1, row)
    assert torch.equal(random_negatives(1, batch)[5:9], random_negatives(1, batch.rows(slice(5, 9))))
    for step in range(6):
        indices = torch.nonzero((batch.place + step) % 2 == 0).flatten()
        examples = replace(batch.rows(indices), step=step)
        assert matched_examples(examples, stage).sum() == len(examples) / 2


# MIM: 8 images of side 12, of which 5 patches of side 4 are masked.
IMAGE = torch.randint(0, 256, (8, 12, 12, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
HIDDEN = torch.rand(8, 9, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :5]


def test_targets_are_the_colour_class_or_normalized_pixels_of_a_patch_and_paint_it_if_predicted_perfectly() -> None:
    assert torch.equal(unpatchify(patchify(IMAGE, 4), 4), IMAGE)
    assert torch.equal(patchify(IMAGE, 4)[0, 5].view(4, 4, 3), IMAGE[0, 4:8, 8:12])
    image = torch.zeros(1, 12, 12, 3, dtype=torch.uint8)
    image[0, :4, :4], image[0, :4, 4:8] = torch.tensor([255, 31, 32]), torch.tensor([0, 255, 128])
    image[0, 4:6, :4] = 255
    classes = patch_targets(image, torch.tensor([[0, 1, 2, 3]]), 4, "mean_colour")
    assert classes.tolist() == [[0o701, 0o074, 0, 0o333]], "the three highest bits per channel of the mean"
    pixels = patch_targets(IMAGE, HIDDEN, 4, "pixels")
    assert (pixels.shape, pixels.dtype) == ((8, 5, 48), torch.float32)
    close(pixels.mean(dim=-1), torch.zeros(8, 5), rtol=0, atol=1e-5)
    close(pixels.var(dim=-1), torch.ones(8, 5), rtol=1e-4, atol=0)
    of_means = mim_loss(torch.zeros_like(pixels), pixels).item()
    assert of_means == pytest.approx(8 * 5 * 47 / 48, rel=1e-4), "patches predicted as their mean cost one each"
    assert (reconstruct(IMAGE, HIDDEN, pixels, 4).int() - IMAGE.int()).abs().max() <= 1
    colours = patch_targets(IMAGE, HIDDEN, 4, "mean_colour")
    painted = reconstruct(IMAGE, HIDDEN, F.one_hot(colours, 512).float(), 4)
    assert torch.equal(patch_targets(painted, HIDDEN, 4, "mean_colour"), colours)
    is_hidden = torch.zeros(8, 9, dtype=torch.bool).scatter(1, HIDDEN, True)
    assert torch.equal(patchify(painted, 4)[~is_hidden], patchify(IMAGE, 4)[~is_hidden])
    of_one_colour = torch.full((1, 12, 12, 3), 77, dtype=torch.uint8)
    assert patch_targets(of_one_colour, torch.tensor([[3]]), 4, "pixels").abs().max() < 1e-3


# WPA: 3 examples of 6 words and 8 patches with features of width 5.
ALIGNED = {"words": normal(6, 5)[:3], "patches": normal(8, 5)[3:]}
ALIGNED["words_keep"] = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
ALIGNED["patches_keep"] = torch.arange(8) < torch.tensor([5, 8, 3])[:, None]
MATCHED = torch.tensor([True, False, True])


def plan_of(words: Tensor, patches: Tensor, words_keep: Tensor, patches_keep: Tensor) -> Tensor:
    return wpa_plan(wpa_cost(words, patches), words_keep, patches_keep)


def gradients(features: dict[str, Tensor], matched: Tensor = MATCHED) -> tuple[Tensor, ...]:
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in features.items()}
    return torch.autograd.grad(wpa_loss(**leaves, matched=matched), [leaves["words"], leaves["patches"]])


def test_transport_plan_has_uniform_marginals_is_nearly_optimal_and_is_not_changed_by_padding() -> None:
    plan = plan_of(**ALIGNED)
    for side, keep in ((2, ALIGNED["words_keep"]), (1, ALIGNED["patches_keep"])):
        close(plan.sum(dim=side), keep / keep.sum(dim=1, keepdim=True), rtol=0.02, atol=1e-4)
    cost = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(3))
    keep = torch.ones(1, 5, dtype=torch.bool)
    # For equal numbers of words and patches the optimal plan is a permutation, which scipy finds exactly.
    best = cost[0].numpy()[linear_sum_assignment(cost[0].numpy())].mean()
    assert best - 1e-4 <= (cost * wpa_plan(cost, keep, keep, outer=500)).sum().item() <= 1.01 * best
    longer = {
        "words": F.pad(ALIGNED["words"], (0, 0, 0, 2), value=9.0),
        "patches": F.pad(ALIGNED["patches"], (0, 0, 0, 3), value=-7.0),
        "words_keep": F.pad(ALIGNED["words_keep"], (0, 2)),
        "patches_keep": F.pad(ALIGNED["patches_keep"], (0, 3)),
    }
    close(plan_of(**longer)[:, :6, :8], plan)
    for mine, other in zip(gradients(ALIGNED), gradients(longer), strict=True):
        close(other[:, : mine.shape[1]], mine)
        assert not other[:, mine.shape[1] :].any()


def test_trap_10_example_of_only_padding_has_no_gradient_and_half_precision_is_computed_in_float32() -> None:
    """For a caption of only [CLS] and [SEP] the published code divides by zero words."""
    for side in ("words_keep", "patches_keep"):
        padded = ALIGNED | {side: ALIGNED[side].index_fill(0, torch.tensor([1]), False)}
        assert not plan_of(**padded)[1].any()
        assert wpa_loss(**padded, matched=MATCHED).isfinite()
        for gradient in gradients(padded):
            assert gradient.isfinite().all()
            assert [bool(row.any()) for row in gradient[:2]] == [True, False]
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in ALIGNED.items()}
    exact = {name: t.float() if t.is_floating_point() else t for name, t in rounded.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan, loss = plan_of(**rounded), wpa_loss(**rounded, matched=MATCHED)
    assert plan.dtype == loss.dtype == torch.float32
    close(plan, plan_of(**exact))


def test_alignment_loss_is_signed_by_the_match_and_its_plan_is_a_constant() -> None:
    plan, words = plan_of(**ALIGNED), ALIGNED["words"].clone().requires_grad_()
    distance = (wpa_cost(words, ALIGNED["patches"]) * plan).sum(dim=(1, 2))
    expected = distance[0] - distance[1] + distance[2]
    close(wpa_loss(**ALIGNED, matched=MATCHED), expected)
    close(gradients(ALIGNED)[0], *torch.autograd.grad(expected, words))
    none = {name: t[:0] for name, t in ALIGNED.items()}
    assert wpa_loss(**none, matched=MATCHED[:0]) == 0
    assert gradients(none, MATCHED[:0])[0].shape == (0, 6, 5)
