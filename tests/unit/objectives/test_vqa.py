"""The VQA loss is the published mean over answers times their number, for any padding or partition of a batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.objectives.vqa import soft_targets, vqa_loss


def rows(count: int = 6, listed: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(count, listed, generator=draw)
    answers = torch.stack([torch.randperm(listed, generator=draw)[:4] for _ in range(count)])
    answers[torch.arange(count) % 3 == 0, 2:] = -1
    answers[1] = -1  # none of its answers is in the list
    return logits, answers, torch.rand(count, 4, generator=draw)


def test_soft_targets_are_the_scores_of_the_answers() -> None:
    targets = soft_targets(
        torch.tensor([[2, 0, -1], [-1, -1, -1]]), torch.tensor([[0.3, 1.0, 0.9], [0.6, 0.6, 0.6]]), 4
    )
    torch.testing.assert_close(targets, torch.tensor([[1.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_loss_is_the_published_mean_times_the_answer_count() -> None:
    logits, answers, scores = rows()
    targets = soft_targets(answers, scores, logits.shape[1])
    published = F.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
    torch.testing.assert_close(vqa_loss(logits, answers, scores) / len(logits), published)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_add_up(parts: int) -> None:
    logits, answers, scores = rows()
    cut = [vqa_loss(*each) for each in zip(*(t.chunk(parts) for t in (logits, answers, scores)), strict=True)]
    torch.testing.assert_close(torch.stack(cut).sum(), vqa_loss(logits, answers, scores))


def test_padding_changes_no_loss() -> None:
    logits, answers, scores = rows()
    wider = F.pad(answers, (0, 5), value=-1), F.pad(scores, (0, 5), value=0.7)
    torch.testing.assert_close(vqa_loss(logits, *wider), vqa_loss(logits, answers, scores))


def test_empty_batch_has_zero_loss_with_a_gradient() -> None:
    logits, answers, scores = (t[:0] for t in rows())
    loss = vqa_loss(logits.requires_grad_(), answers, scores)
    loss.backward()
    assert loss.item() == 0.0
