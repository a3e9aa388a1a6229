"""The vocabulary head and the loss in one pass over chunks of rows: logits of all rows never exist at once.

The forward also computes the gradient of the hidden states (and of the head, where it trains), as the loss is the last
thing of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LossWeights(NamedTuple):
    """Weights of a row's loss terms.

    ce: to the data token. kl: KL(teacher || student). tv: total variation to the teacher. certainty: entropy at
    `temperature` on rows whose argmax is right (certainty forcing: dParallel, arXiv 2509.26488, section 3).
    """

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    certainty: float = 0.0
    temperature: float = 0.5

    @property
    def needs_teacher(self) -> bool:
        return self.kl > 0 or self.tv > 0


class RowLosses(NamedTuple):
    """Per row, without gradient: cross-entropy, distance to the teacher (0 without one), argmax is the target."""

    ce: Tensor
    kl: Tensor
    correct: Tensor


class Teacher(NamedTuple):
    """Where the frozen model's logits come from: final-normed hidden states [rows, hidden] and its head."""

    hidden: Tensor
    head: Tensor


class Objective(NamedTuple):
    """What rows learn. target: [rows] int64; weight: [rows]; teacher: of the same rows; weights: of the loss terms."""

    target: Tensor
    weight: Tensor
    teacher: Teacher | None
    weights: LossWeights

    def part(self, rows: slice) -> Objective:
        """That of some of the rows."""
        teacher = None if self.teacher is None else self.teacher._replace(hidden=self.teacher.hidden[rows])
        return Objective(self.target[rows], self.weight[rows], teacher, self.weights)


ChunkLoss = Callable[[Tensor, Tensor, Objective, bool], tuple[Tensor, Tensor, Tensor, Tensor, Tensor, "Tensor | None"]]


def chunk_loss(
    hidden: Tensor, head: Tensor, objective: Objective, head_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Losses of a chunk: weighted sum, ce, kl, correct, and the gradients of the sum for hidden and head.

    hidden: [rows, hidden]; head: [vocab, hidden]. The head's gradient is None without `head_gradient`.
    """
    target, weight, teacher, weights = objective
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ head.T).to(wide)
    logp = logits - logits.logsumexp(-1, keepdim=True)
    p = logp.exp()
    ce = -logp.gather(1, target[:, None])[:, 0]
    correct = logits.argmax(-1) == target
    is_target = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    loss, gradient = weights.ce * ce, weights.ce * (p - is_target.to(wide))
    kl = torch.zeros_like(ce)
    if teacher is not None:
        log_q = (teacher.hidden @ teacher.head.T).to(wide).log_softmax(-1)
        q = log_q.exp()
        kl = (q * (log_q - logp)).sum(-1)
        loss, gradient = loss + weights.kl * kl, gradient + weights.kl * (p - q)
        if weights.tv > 0:
            sign = torch.sign(p - q)
            loss = loss + weights.tv * 0.5 * (p - q).abs().sum(-1)
            gradient = gradient + weights.tv * 0.5 * p * (sign - (p * sign).sum(-1, keepdim=True))
    if weights.certainty > 0:
        sharp_log = (logits / weights.temperature).log_softmax(-1)
        sharp = sharp_log.exp()
        entropy = -(sharp * sharp_log).sum(-1)
        active = weights.certainty * correct.to(wide)
        loss = loss + active * entropy
        slope = -sharp * (sharp_log + entropy[:, None]) / weights.temperature
        gradient = gradient + active[:, None] * slope
    weight = weight.to(wide)
    gradient = (gradient * weight[:, None]).to(hidden.dtype)
    head_part = (gradient.T @ hidden).to(wide) if head_gradient else None
    return (loss * weight).sum(), ce, kl, correct, gradient @ head, head_part


class HeadLoss:
    """The fused head and loss; `compiled` compiles the chunk once for each set of weights."""

    def __init__(self, chunk: int, compiled: bool) -> None:
        self._chunk = chunk
        self._run: ChunkLoss = torch.compile(chunk_loss, dynamic=False) if compiled else chunk_loss

    def __call__(self, hidden: Tensor, head: Tensor, objective: Objective) -> tuple[Tensor, RowLosses]:
        """Weighted sum of the rows' losses (differentiable in hidden and head) and what each row lost.

        hidden: [rows, hidden], final-normed; head: [vocab, hidden].
        """
        if not objective.weights.needs_teacher:
            objective = objective._replace(teacher=None)
        chunk = chunk_length(len(hidden), self._chunk)
        loss, *parts = _Fused.apply(hidden, head, objective, chunk, self._run)  # type: ignore[no-untyped-call]
        return loss, RowLosses(*parts)


def chunk_length(rows: int, longest: int) -> int:
    """The largest divisor of `rows` up to `longest`: chunks of one shape compile once."""
    return next(size for size in range(min(rows, longest), 0, -1) if rows % size == 0)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, objective: Objective, chunk: int, run: ChunkLoss
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        gradient = torch.empty_like(hidden) if wants_hidden else None
        head_gradient: Tensor | None = None
        totals, ces, kls, corrects = [], [], [], []
        frozen_head = head.detach()
        for begin in range(0, len(hidden), chunk):
            part = slice(begin, begin + chunk)
            total, ce, kl, correct, slope, head_part = run(
                hidden[part].detach(), frozen_head, objective.part(part), wants_head
            )
            if gradient is not None:
                gradient[part] = slope
            if head_part is not None:
                head_gradient = head_part if head_gradient is None else head_gradient.add_(head_part)
            totals.append(total)
            ces.append(ce)
            kls.append(kl)
            corrects.append(correct)
        ctx.save_for_backward(gradient, head_gradient)
        ctx.head_dtype = head.dtype
        ce, kl, correct = torch.cat(ces), torch.cat(kls), torch.cat(corrects)
        ctx.mark_non_differentiable(ce, kl, correct)
        return torch.stack(totals).sum(), ce, kl, correct

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient, head_gradient = ctx.saved_tensors
        scale = outer[0]
        if gradient is not None:
            gradient = gradient * scale.to(gradient.dtype)
        if head_gradient is not None:
            head_gradient = (head_gradient * scale).to(ctx.head_dtype)
        return (gradient, head_gradient, None, None, None)
