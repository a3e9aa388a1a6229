"""What a scheduler's rows have done, in numbers that only grow. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from .histogram import Histogram
from .plan import REASONS, RowPlan, RowReport
from .sequence import Sequence

FORWARD_KINDS = ("prefill", "commit", "denoise", "mixed", "idle")
COMMIT_REASONS = ("clean", "draft", *REASONS)
ENDINGS = ("stop", "length", "abort")


class Ran(msgspec.Struct, frozen=True, gc=False):
    """What a forward ran of a row. clean, run_start, start: of its sequence before it, which has moved on since. holds:
    whether it held a slot by then: was not aborted, nor preempted."""

    sequence: Sequence
    row: RowPlan
    report: RowReport
    clean: int
    run_start: int
    start: int
    holds: bool


@dataclass
class SchedulerCounters:
    """forwards: by what their rows did: prefill, commit, denoise, mixed, or idle: all of them had ended meanwhile.

    commits: positions decided, by reason: `clean` by a clean row, as an autoregressive model would; `draft` for drafts
    that a clean row confirmed; else the strategy's (`plan.REASONS`). discarded: decided positions that are no part of
    the text, by how it ended; abort: before its end. padding_positions: room of rows that they did not need.
    """

    preemptions: int = 0
    prefill_positions: int = 0  # clean positions of prompts
    commit_positions: int = 0  # clean positions of generated text
    denoise_positions: int = 0
    padding_positions: int = 0
    blocks_finished: int = 0
    committed_tokens: int = 0
    edited_tokens: int = 0
    remasked_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    cached_rows: int = 0
    refreshed_rows: int = 0
    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORWARD_KINDS, 0))
    commits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COMMIT_REASONS, 0))
    discarded: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDINGS, 0))
    steps_per_block: Histogram = field(default_factory=lambda: Histogram("steps_per_block"))
    block_seconds: Histogram = field(default_factory=lambda: Histogram("block_seconds"))
    forward_positions: Histogram = field(default_factory=lambda: Histogram("forward_positions"))
    forward_rows: Histogram = field(default_factory=lambda: Histogram("forward_rows"))

    def count_forward(self, rows: list[Ran]) -> None:
        """One forward, by the rows that had something to do."""
        prefill = commit = denoise = 0
        for ran in rows:
            row, clean = ran.row, ran.clean
            if clean:
                clean = min(row.width, clean)
                of_prompt = min(clean, max(ran.sequence.prompt_len - ran.run_start, 0))
                prefill += of_prompt
                commit += clean - of_prompt
            denoise += row.width - clean + row.segments * row.segment
            # The device does not know who was aborted.
            if row.targets and ran.holds:
                self._count_decisions(ran.sequence, row, ran.report)
                if ran.sequence.caches_blocks:
                    self._count_cache(ran)
        counts = prefill, commit, denoise
        self.prefill_positions += prefill
        self.commit_positions += commit
        self.denoise_positions += denoise
        kinds = [kind for kind, count in zip(FORWARD_KINDS[:3], counts, strict=True) if count] or ["idle"]
        self.forwards[kinds[0] if len(kinds) == 1 else "mixed"] += 1
        self.forward_positions.observe(sum(counts))
        self.forward_rows.observe(len(rows))

    def _count_decisions(self, sequence: Sequence, row: RowPlan, report: RowReport) -> None:
        committed, commits = report.committed, self.commits
        if committed and sequence.geometry.refeeds:
            self.drafted_tokens += row.targets - 1
            self.accepted_tokens += committed - 1
            commits["draft"] += committed - 1
            commits["clean"] += 1
        elif committed:
            commits["clean"] += report.clean
            commits[REASONS[report.reason]] += committed - report.clean
        if report.edited or report.remasked:
            self.edited_tokens += report.edited
            self.remasked_tokens += report.remasked

    def _count_cache(self, ran: Ran) -> None:
        """Whether the row left part of its block, or of its canvas, to K/V of an earlier step."""
        geometry, width = ran.sequence.geometry, ran.row.width
        if geometry.canvas:
            whole = width == geometry.canvas
        elif ran.run_start + width <= ran.start:
            return  # the forward before the block, which tells its first position
        else:
            whole = ran.run_start <= ran.start
        self.refreshed_rows += whole
        self.cached_rows += not whole

    def count_block(self, sequence: Sequence, now: float) -> None:
        """Every position of the sequence's block is decided. now: seconds of any clock that runs on."""
        self.blocks_finished += 1
        self.steps_per_block.observe(sequence.block_steps)
        if sequence.block_ended is not None:
            self.block_seconds.observe(now - sequence.block_ended)
        sequence.block_steps, sequence.block_ended = 0, now
