"""The strategy interface: how one decoder of the literature is told apart from another."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from ..family import FamilyTraits
from ..params import ParameterValue
from .filter import Filter
from .halt import TOKEN, apply_halt, halt_memory
from .memory import Memory
from .spans import plan_grid
from .view import Decision, LogitBias, RowView, Span, WindowStatistics

Values = Mapping[str, ParameterValue]

# A parameter of those that draft.
RowCost = (
    Annotated[
        float,
        Meta(
            ge=0.0,
            le=1.0,
            description="what a row must promise, in tokens, to be run; 0 runs all; default: by device and load",
        ),
    ]
    | None
)

# Longest block of the families whose blocks exist only while decoding.
MAX_BLOCK = 256


class Needs(enum.Flag):
    """What a strategy wants to know of every position it asks about, beside the token and its confidence."""

    NOTHING = 0
    ENTROPY = enum.auto()
    MARGIN = enum.auto()


@dataclass(frozen=True)
class Equipment:
    """What of a model folder strategies use beside the model."""

    filter: Filter | None = None


class Strategy:
    """Pure functions on batched tensors. A row's result never depends on its neighbours; nothing waits for the host.

    `plan` says which positions to run next; `decide` what to commit of what the model proposed. The engine owns
    memory, forwards, the end of a text and the guards (`advance.py`).

    name, source: what a request calls it, and the paper or code that it follows. Params: its parameters, as a msgspec
    struct whose docstring is the summary.
    frontier: rows go on from their first undecided position, wherever it is; those of others lie on the grid of blocks.
    refeeds: (frontier) the last token is fed again, since its row predicts the next one.
    asks_all: rows may want statistics of decided positions of the block, too. biased: it changes logits before they are
        looked at.
    edits: it carries out the ids that delete and insert (`FamilyTraits.edit_ids`); rows of others never say them.
    branches: its draft segments hold tokens, and statistics of all of them are wanted. Those of a frontier are causal
        and clean like its span; others see all of themselves.
    sums: it decides by sums of floats, whose order a compiler may change; chains: so does its plan, which says what is
        worth running, and on which ranks have to agree. Those stages run as they are written.
    reference: keep the rules of progress of the authors' code where ours differ.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    Params: ClassVar[type[msgspec.Struct]]
    frontier: ClassVar[bool] = False
    refeeds: ClassVar[bool] = False
    asks_all: ClassVar[bool] = False
    biased: ClassVar[bool] = False
    edits: ClassVar[bool] = False
    branches: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    chains: ClassVar[bool] = False

    def __init__(self, reference: bool = False, equipment: Equipment | None = None) -> None:
        self.reference = reference
        self.equipment = equipment or Equipment()

    def refusal(self, traits: FamilyTraits) -> str:
        """Why the strategy is not valid on a family; "" if it is."""
        raise NotImplementedError

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        """What a family changes of the parameters: name -> fields of ParameterInfo, or None: it has no such one."""
        return {}

    def needs(self, values: Values) -> Needs:
        return Needs.NOTHING

    def memory(self, values: Values, traits: FamilyTraits) -> dict[str, Memory]:
        """What a row with these parameters has to keep from step to step."""
        return {}

    def window(self, values: Values, traits: FamilyTraits) -> int:
        """Positions from a row's `start` on that a step looks at."""
        raise NotImplementedError

    def block(self, values: Values, traits: FamilyTraits) -> int:
        """Positions of a block, of which the window holds one or several."""
        return self.window(values, traits)

    def first_feed(self, values: Values, traits: FamilyTraits) -> int:
        """(frontier) Rows that a sequence's first step runs from its frontier on."""
        return self.window(values, traits)

    def segment(self, values: Values, traits: FamilyTraits) -> int:
        """Rows of a draft segment; 0 where the strategy has none."""
        return 0

    def shortest(self, values: Values, traits: FamilyTraits) -> int:
        """Rows that are left of one when it is cut short: what it holds stays a draft segment."""
        return self.segment(values, traits)

    def segments(self, values: Values) -> int:
        """How many of them a step may want, though the one before wanted none."""
        return 0

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        raise NotImplementedError

    def bias(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> LogitBias:
        """(biased) What to add to the logits, given the statistics without it; `decide` sees those with it."""
        raise NotImplementedError

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        raise NotImplementedError


class GridParams(msgspec.Struct, frozen=True):
    """What every strategy that refines blocks can be told."""

    confidence: Annotated[
        Literal["tempered", "filtered"],
        Meta(description="probability before, or after, top-k/top-p/min-p (renormalised)"),
    ] = "tempered"
    block_length: (
        Annotated[
            int, Meta(ge=1, le=MAX_BLOCK, description="positions decided together; default: the model's block size")
        ]
        | None
    ) = None
    sub_block_size: Annotated[int, Meta(ge=1, description="positions refined together; divides the block")] | None = (
        None
    )
    sub_block_cache: Annotated[
        bool,
        Meta(description="refine a sub-block on stale K/V of the others: approximate, and a preemption may change it"),
    ] = False
    cache: Annotated[
        Literal["none", "prefix", "dual"],
        Meta(description="K/V kept within a block: none, of what stands before it, or of all around it (approximate)"),
    ] = "prefix"
    aligned: Annotated[bool, Meta(description="blocks on the grid from the sequence's start, not the prompt's end")] = (
        False
    )
    smoothing: (
        Annotated[
            float,
            Meta(
                ge=0.0, le=1.0, description="most weight of what a mask said before in its input (dInfer); default: 0"
            ),
        ]
        | None
    ) = None
    smoothing_start: (
        Annotated[float, Meta(ge=0.0, le=1.0, description="that weight after a block's first forward; default: 0.15")]
        | None
    ) = None
    smoothing_growth: (
        Annotated[float, Meta(ge=0.0, le=1.0, description="what each forward adds to the weight; default: 0.02")] | None
    ) = None
    halt: (
        Annotated[
            Literal["never", "linear", "cosine", "exponential"],
            Meta(
                description="SchED: end a block once its margins pass a bar that falls along this curve; default: never"
            ),
        ]
        | None
    ) = None
    halt_high: (
        Annotated[float, Meta(ge=0.0, le=100.0, description="the bar at the start, a margin of logits; default: 7.5")]
        | None
    ) = None
    halt_low: Annotated[float, Meta(ge=0.0, le=100.0, description="the bar at the end; default: 2.5")] | None = None
    halt_rate: (
        Annotated[float, Meta(ge=0.0, le=64.0, description="how fast the exponential curve falls; default: 4")] | None
    ) = None
    halt_progress: (
        Annotated[float, Meta(ge=0.0, le=1.0, description="share decided before which none halts; default: 0")] | None
    ) = None
    halt_change: (
        Annotated[
            float, Meta(ge=0.0, le=1.0, description="share of proposals that may change in a stable step; default: 0")
        ]
        | None
    ) = None
    halt_quantile: (
        Annotated[float, Meta(ge=0.0, le=1.0, description="quantile of the margins to look at; default: their mean")]
        | None
    ) = None
    halt_patience: (
        Annotated[int, Meta(ge=0, le=256, description="stable steps beyond the first before a halt; default: 0")] | None
    ) = None


class GridStrategy(Strategy):
    """A strategy that refines the active block; `choose` is its commit rule, SchED's halt may end the block early."""

    def refusal(self, traits: FamilyTraits) -> str:
        if traits.mask_id is None:
            return "an autoregressive model has no masks to decide"
        if traits.in_block == "causal":
            return "its masks see what stands before them only, so there is no block to refine"
        return ""

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        size = traits.block_size
        divisors = tuple(n for n in range(1, size + 1) if size % n == 0)
        changes: dict[str, dict[str, Any] | None] = {
            "block_length": None,
            "sub_block_size": {"choices": divisors},
            "cache": None,
            "aligned": None,
            "denoising_steps": {"maximum": size},
        }
        if traits.context == "full":
            changes = {
                "block_length": {"default": size},
                "sub_block_size": None,
                "sub_block_cache": None,
            }
        elif traits.final_by_token:
            # Decided tokens are final as soon as all before them are: nothing is stale.
            changes["sub_block_cache"] = None
        elif traits.routes_blocks:
            # Which experts a block has depends on all of it.
            changes["sub_block_cache"] = None
        if traits.context != "full" or traits.logit_source != "own":
            # As dInfer has it: a mask mixes in what its own row says, and no K/V but the canvas's comes of it.
            changes |= {name: None for name in GridParams.__struct_fields__ if name.startswith("smoothing")}
        return changes

    def needs(self, values: Values) -> Needs:
        return Needs.MARGIN if values.get("halt", "never") != "never" else Needs.NOTHING

    def memory(self, values: Values, traits: FamilyTraits) -> dict[str, Memory]:
        return halt_memory(self.widest(traits)) if self.needs(values) & Needs.MARGIN else {}

    def window(self, values: Values, traits: FamilyTraits) -> int:
        return int(values.get("block_length", traits.block_size))

    def widest(self, traits: FamilyTraits) -> int:
        """The longest block that a request may ask for."""
        return MAX_BLOCK if traits.context == "full" else traits.block_size

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        return plan_grid(view, traits, asks_all=self.asks_all)

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        decision = self.choose(view, statistics, traits)
        halting = statistics.margin is not None and TOKEN in view.memory
        return apply_halt(view, statistics, decision) if halting else decision

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        raise NotImplementedError


class FrontierStrategy(Strategy):
    """A strategy of token-causal models that feeds the last token again, with drafts behind it."""

    frontier = True
    refeeds = True

    def refusal(self, traits: FamilyTraits) -> str:
        return "" if traits.context == "token-causal" else "it needs a model whose final tokens see only earlier ones"
