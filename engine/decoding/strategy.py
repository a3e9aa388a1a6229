"""The strategy interface: how a decoder of the literature is told apart from another."""

from __future__ import annotations

from typing import Protocol

from ..family import FamilyTraits
from .view import Decision, RowView, Span, WindowStatistics


class Strategy(Protocol):
    """Pure functions on batched tensors. A row's result never depends on its neighbours; nothing waits for the host.

    `plan` says which positions to run next; `decide` what to commit of what the model proposed. The engine owns
    memory, forwards, the end of a text and the guards (`advance.py`).
    """

    name: str

    def plan(self, view: RowView, traits: FamilyTraits) -> Span: ...

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision: ...
