"""What is counted on the device while training and evaluating, read only when a record is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .loss import RowLosses
from .network import Batch, Output
from .segments import clean_visibility
from .settings import Context

OFFSETS = 8  # of a row in its segment; later ones count with the last
_SUMS = ("count", "correct", "ce", "kl", "draft_count", "draft_correct", "draft_ce")
_SCALARS = ("ar_count", "ar_kl", "segments", "accepted", "draft_accepted", "noisy_pairs", "clean_pairs")


class Tally:
    """Sums by offset, apart for all-masked and partly masked segments: [2, sums, OFFSETS]."""

    def __init__(self, device: torch.device) -> None:
        self.by_offset = torch.zeros(2, len(_SUMS), OFFSETS, device=device)
        self.scalars = torch.zeros(2, len(_SCALARS), device=device)

    def clear(self) -> None:
        self.by_offset.zero_()
        self.scalars.zero_()

    def add_batch(self, batch: Batch, output: Output, context: Context) -> None:
        """Count a micro-batch: what its rows lost, and the pairs of a query and a key it sees."""
        self.add_rows(output.noisy, output.weight, output.offset, batch.partial)
        if output.draft is not None:
            self.add_rows(output.draft, output.weight, output.offset, batch.partial, draft=True)
        if output.clean is not None and batch.clean_weight is not None:
            counted = (batch.clean_weight.flatten() > 0).float()
            self.add("ar_count", counted.sum(), batch.partial)
            self.add("ar_kl", (output.clean.kl * counted).sum(), batch.partial)
        v = batch.segments.visibility
        self.add("noisy_pairs", (v.context_end - v.context_start + v.own_end - v.own_start).sum())
        c = clean_visibility(batch.rows, context, batch.block)
        self.add("clean_pairs", (c.context_end - c.context_start).sum())

    def add_rows(self, losses: RowLosses, weight: Tensor, offset: Tensor, partial: bool, draft: bool = False) -> None:
        """Count rows with a weight above 0: losses, weight, offset are [rows] each."""
        counted = (weight > 0).float()
        place = offset.clamp(max=OFFSETS - 1)
        values = [counted, counted * losses.correct, counted * losses.ce, counted * losses.kl]
        names = ("draft_count", "draft_correct", "draft_ce") if draft else _SUMS[:4]
        for name, value in zip(names, values, strict=False):
            self.by_offset[int(partial), _SUMS.index(name)].index_add_(0, place, value.float())

    def add(self, name: str, value: Tensor, partial: bool = False) -> None:
        self.scalars[int(partial), _SCALARS.index(name)] += value

    def add_runs(self, correct: Tensor, weight: Tensor, m: int, draft: bool = False) -> None:
        """Count the leading right rows of each all-masked segment: the drafts a greedy verification would accept.

        correct, weight: [rows, noisy_rows]. Segments without a first target do not count.
        """
        whole = correct.shape[1] // m * m
        right = (correct & (weight > 0))[:, :whole].unflatten(1, (-1, m))
        counted = (weight > 0)[:, :whole].unflatten(1, (-1, m))[..., 0]
        runs = right.long().cumprod(-1).sum(-1)
        self.add("draft_accepted" if draft else "accepted", (runs * counted).sum())
        if not draft:
            self.add("segments", counted.sum())

    def read(self) -> dict[str, Any]:
        """Means as plain numbers. Waits for the device. Keys without any count are left out."""
        record: dict[str, Any] = {}
        scalars = self.scalars.tolist()
        for partial, kind in ((0, "draft"), (1, "denoise")):
            sums = dict(zip(_SUMS, self.by_offset[partial].tolist(), strict=True))
            for prefix, name in (("", kind), ("draft_", f"{kind}_head")):
                counts = sums[f"{prefix}count"]
                total = sum(counts)
                if not total:
                    continue
                record[f"{name}_ce"] = round(sum(sums[f"{prefix}ce"]) / total, 4)
                accuracy = [c / n for c, n in zip(sums[f"{prefix}correct"], counts, strict=True) if n]
                record[f"{name}_accuracy"] = [round(a, 4) for a in accuracy]
                if kind == "draft":
                    record[f"{name}_expected"] = round(_expected_run(accuracy), 4)
                if not prefix and sum(sums["kl"]):
                    record[f"{name}_kl"] = round(sum(sums["kl"]) / total, 4)
        found = dict(zip(_SCALARS, scalars[0], strict=True))
        if found["segments"]:
            record["accepted"] = round(found["accepted"] / found["segments"], 4)
            if found["draft_accepted"]:
                record["head_accepted"] = round(found["draft_accepted"] / found["segments"], 4)
        ar_count = scalars[0][0] + scalars[1][0]
        if ar_count:
            record["ar_kl"] = round((scalars[0][1] + scalars[1][1]) / ar_count, 5)
        return record

    def pairs(self) -> tuple[float, float]:
        """Noisy and clean pairs of a query and a key it sees. Waits for the device."""
        noisy, clean = (self.scalars[:, _SCALARS.index(name)].sum() for name in ("noisy_pairs", "clean_pairs"))
        return float(noisy), float(clean)


def _expected_run(accuracy: list[float]) -> float:
    """Expected leading right drafts if offsets were independent."""
    expected, product = 0.0, 1.0
    for a in accuracy:
        product *= a
        expected += product
    return expected
