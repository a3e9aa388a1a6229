"""The fused head and loss against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linocut.training.loss import HeadLoss, LossWeights, Objective, Teacher, chunk_length


def plain_loss(hidden: Tensor, head: Tensor, objective: Objective) -> Tensor:
    target, weight, teacher, w = objective
    assert teacher is not None
    logits = hidden @ head.T
    logp = logits.log_softmax(-1)
    loss = w.ce * F.cross_entropy(logits, target, reduction="none")
    q = (teacher.hidden @ teacher.head.T).softmax(-1)
    loss = loss + w.kl * F.kl_div(logp, q, reduction="none").sum(-1)
    loss = loss + w.tv * 0.5 * (logp.exp() - q).abs().sum(-1)
    sharp = (logits / w.temperature).log_softmax(-1)
    entropy = -(sharp.exp() * sharp).sum(-1)
    loss = loss + w.certainty * entropy * (logits.argmax(-1) == target)
    return (loss * weight).sum()


@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(),
        LossWeights(ce=0.5, kl=0.5),
        LossWeights(ce=0.0, kl=0.3, tv=1.0),
        LossWeights(ce=1.0, certainty=2.0),
        LossWeights(ce=0.2, kl=0.1, tv=0.7, certainty=0.5, temperature=0.8),
    ],
)
@pytest.mark.parametrize("frozen_head", [True, False])
def test_loss_and_gradients_equal_plain_autograd(weights: LossWeights, frozen_head: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(24, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(40, 16, dtype=torch.float64, requires_grad=not frozen_head)
    teacher = Teacher(torch.randn(24, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64))
    # Some rows are right, so that certainty forcing acts.
    target = torch.where(torch.arange(24) % 2 == 0, (hidden @ head.T).argmax(-1), torch.randint(0, 40, (24,)))
    weight = torch.rand(24, dtype=torch.float64) * (torch.arange(24) % 5 > 0)
    objective = Objective(target, weight, teacher, weights)
    loss, rows = HeadLoss(8, compiled=False)(hidden, head, objective)
    wanted = [hidden] if frozen_head else [hidden, head]
    ours = torch.autograd.grad(3.0 * loss, wanted)
    expected = plain_loss(hidden, head, objective)
    theirs = torch.autograd.grad(3.0 * expected, wanted)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(rows.correct, (hidden @ head.T).argmax(-1) == target)
    torch.testing.assert_close(rows.ce, F.cross_entropy(hidden @ head.T, target, reduction="none"))


def test_chunks_divide_the_rows() -> None:
    assert chunk_length(65536, 4096) == 4096
    assert chunk_length(96, 64) == 48
    assert chunk_length(7, 100) == 7
