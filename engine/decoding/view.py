"""What a strategy sees of a step and what it answers: batched tensors over the rows of one strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .columns import Parameters

T = TypeVar("T")


class once(Generic[T]):
    """functools.cached_property without its lock, which torch.compile does not see through."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute, self._name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value = self._compute(instance)
        setattr(instance, self._name, value)
        return value


@dataclass
class RowView:
    """The rows of one strategy; window tensors cover positions start .. start + W - 1.

    slots: [rows] int64. start, final_len, prompt_len, limit, step: [rows] int32 (see RowState). block, window: [rows]
    int32, positions of a row's block, and of the blocks that it looks at; canvas: [rows] int32, where a full-attention
    row's sequence ends, 0 elsewhere.
    tokens: [rows, W] int32; decided: [rows, W] bool. fresh: [rows] bool. drafts: [rows] int32, how many of the window's
    tokens are drafts; draft_confidence: [rows, MAX_DRAFT] float32; row_cost: [rows] float32. sampled: [rows] bool,
    whether tokens are drawn, with noise that differs from step to step. parameters: name -> [rows]. memory: name ->
    [slots of the engine, ...], see `recall` and `remember`.
    """

    slots: Tensor
    start: Tensor
    final_len: Tensor
    prompt_len: Tensor
    limit: Tensor
    step: Tensor
    block: Tensor
    window: Tensor
    canvas: Tensor
    tokens: Tensor
    decided: Tensor
    fresh: Tensor
    drafts: Tensor
    draft_confidence: Tensor
    row_cost: Tensor
    sampled: Tensor
    parameters: Parameters
    memory: dict[str, Tensor] = field(default_factory=dict)
    # [rows, K] int32, ids that end a row's text, padded with -1; none where the view is not an engine's.
    stops: Tensor | None = None

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @once
    def offsets(self) -> Tensor:
        """[W] int32"""
        return torch.arange(self.width, device=self.start.device, dtype=torch.int32)

    @once
    def places(self) -> Tensor:
        """[rows, W] int32, the positions of the window."""
        return self.start[:, None] + self.offsets

    @once
    def inside(self) -> Tensor:
        """[rows, W] bool, positions of the row's own blocks: windows of a batch are as wide as its widest. The last
        block of a text is whole, but that of a full-attention canvas ends with it."""
        within = self.offsets < self.window[:, None]
        block = self.start[:, None] + self.offsets // self.block[:, None] * self.block[:, None]
        return within & (torch.where((self.canvas > 0)[:, None], self.places, block) < self.limit[:, None])

    @once
    def generated(self) -> Tensor:
        """[rows, W] bool, positions of the blocks behind the prompt."""
        return self.inside & (self.places >= self.prompt_len[:, None])

    @once
    def masked(self) -> Tensor:
        """[rows, W] bool, undecided positions of the blocks."""
        return self.inside & ~self.decided

    def chosen(self, name: str, value: str) -> Tensor:
        """[rows] bool, whether a parameter with a choice of texts has this value."""
        return self.parameters[name] == self.parameters.columns.of[name].codes[value]

    def recall(self, name: str) -> Tensor:
        """[rows, ...]: what was remembered; of a window's length, the first W of it."""
        kept = self.memory[name][self.slots]
        return kept[:, : self.width] if kept.dim() > 1 else kept

    def remember(self, name: str, value: Tensor) -> None:
        """Keep `value` ([rows, ...]) for the rows' next step. Rows that ran a chunk keep what they had."""
        kept = self.memory[name]
        if value.dim() > 1 and value.shape[1] < kept.shape[1]:
            value = pad(value, (0, 0) * (value.dim() - 2) + (0, kept.shape[1] - value.shape[1]))
        whole = self.whole.view(-1, *[1] * (value.dim() - 1))
        kept[self.slots] = torch.where(whole, value.to(kept.dtype), kept[self.slots])

    # Whether the row ran all of its span: [rows] bool, set by the runner before `decide`.
    whole: Tensor = field(init=False)


@dataclass
class Span:
    """Which positions a row runs next, and which it asks about.

    run_start, run_end: [rows] int32. clean_end: [rows] int32, rows below it hold final tokens, so that their K/V is
    final after the forward. targets: [rows, W] bool, window positions whose statistics are needed. seeding: [rows]
    bool, the only target is the block's first position, which the clean forward before it predicts. opening: [rows,
    W] bool, targets that a clean row predicts.
    order: [rows, W] int64 or None: the window positions in the order in which they are fed, each seeing only those
    before it; None where they stand in their natural order.
    segments: [rows, S] int32 or None: draft segments behind the span, in order; each holds the number of window
    positions that it sees, -1 where there is none. segment_tokens: [rows, S, L] ids of their rows; None: all masks.
    """

    run_start: Tensor
    run_end: Tensor
    clean_end: Tensor
    targets: Tensor
    seeding: Tensor
    opening: Tensor
    order: Tensor | None = None
    segments: Tensor | None = None
    segment_tokens: Tensor | None = None


@dataclass
class WindowStatistics:
    """Statistics on the window grid. candidates: [rows, W] bool, where the others mean anything.

    token: [rows, W] int64, proposed id. confidence: [rows, W] float32, -inf elsewhere. entropy (nats), margin (of the
    two best logits): [rows, W] float32, where a strategy of the batch needs them.
    segments: of the draft segments, [rows, S, L]; where a strategy with `branches` ran some. On a frontier entry i of a
        segment is what its row i says of the next position.
    """

    candidates: Tensor
    token: Tensor
    confidence: Tensor
    entropy: Tensor | None = None
    margin: Tensor | None = None
    segments: WindowStatistics | None = None


@dataclass
class LogitBias:
    """What is added to the logits of a window's positions. ids: [rows, W, S] int64; values: [rows, W, S] float32."""

    ids: Tensor
    values: Tensor

    def flat(self) -> LogitBias:
        """[rows * W, S]"""
        return LogitBias(self.ids.flatten(0, 1), self.values.flatten(0, 1))


@dataclass
class Decision:
    """commit: [rows, W] bool, positions decided now; tokens: [rows, W] their ids.

    idle: a step of the authors' schedule may decide nothing; else a row decides one position at least.
    overwrite: [rows, W] bool, decided positions behind the prompt that take `tokens` instead. remask: [rows, W] bool,
        those that become masks again.
    open: [rows] bool, the block is not finished whatever is decided, and nothing of it is final. revisable: [rows]
        bool, nothing of it is final before all of it is decided. settled: [rows] bool, the forward saw the block as it
        is now, so that its K/V is final.
    passed: [rows] int32, positions by which the window moves on; None: by the row's block, once all of it is decided.
    reason: [rows] int64, why the row's positions were decided, an index of `plan.REASONS`; None: by its rule.
    steps: [rows] int32, single steps that the decision stands for (sampling draws by the step); None: one.
    drafts: [rows, W] ids to stand at undecided positions, counted from the new `start`; None keeps what is there.
    accepted: [rows] int64, how many of the drafts that masks made were right; None where masks make none.
    backed: (frontier that feeds the last token again) [rows] int64, how many positions of the window hold K/V of what
        is decided there; None: all decided ones but the last.
    """

    commit: Tensor
    tokens: Tensor
    idle: bool = False
    overwrite: Tensor | None = None
    remask: Tensor | None = None
    open: Tensor | None = None
    revisable: Tensor | None = None
    settled: Tensor | None = None
    passed: Tensor | None = None
    reason: Tensor | None = None
    steps: Tensor | None = None
    drafts: Tensor | None = None
    accepted: Tensor | None = None
    backed: Tensor | None = None
