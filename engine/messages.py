"""Messages between the server and the engine process: msgspec structs, sent as msgpack over ZeroMQ."""

from __future__ import annotations

from typing import Literal

import msgspec

from .decoding.description import StrategyInfo
from .histogram import Distribution
from .params import DecodingParams, ParameterValue, SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class AddRequest(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Start `n` choices of one prompt. Choice i is sampled with the noise of (seed, i).

    suffix: ids that follow the generated text, for models that see them (full attention). salt: tenants with different
    salts never share prefix pages.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    decoding: DecodingParams
    n: int = 1
    suffix: list[int] = []
    salt: str = ""


class Abort(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """End a request (all its choices) or, with `choice`, one of them. Unknown ids are ignored.

    No further output is sent for what is aborted.
    """

    request_id: str
    choice: int | None = None


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop the engine process at once; running requests are dropped."""


EngineInput = AddRequest | Abort | Shutdown


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the server must know of the loaded model and the resolved configuration."""

    family: str
    context: Literal["block-causal", "token-causal", "full", "canvas"]
    block_size: int
    vocab_size: int
    max_model_len: int  # prompt plus generated tokens, and the suffix where there is one
    default_max_tokens: int | None = None  # of a request that names none; None: what the context has left
    mask_id: int | None
    stop_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]  # ids that no request may be given as text or choose as output
    strategy_table: tuple[StrategyInfo, ...]  # all of them, the family's default first
    default_strategy: str
    default_parameters: dict[str, ParameterValue]
    default_sampling: dict[str, float]  # of the checkpoint's generation_config.json
    dtype: str
    device: str
    device_name: str  # of the card; of a CPU, with the threads that forwards run on
    numerics: Literal["fast", "reference"]
    attention: str
    quantization: str
    prefix_caching: bool
    token_budget: int
    page_size: int
    pages: int
    max_running: int
    max_queued: int

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the strategies that are valid on this model, the family's default first."""
        return tuple(strategy.name for strategy in self.strategy_table if not strategy.refusal)

    @property
    def capacity(self) -> int:
        """Choices that an engine holds, running and queued."""
        return self.max_running + self.max_queued


class Ready(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """First message of the engine: the model is loaded and requests are welcome."""

    model: ModelInfo


class ChoiceOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step committed to one choice.

    token_ids: newly committed prefix tokens, in order; a stop id that ended the sequence is the last of them.
    stop_token: the stop id that ended it (then finish_reason is "stop"); its text is not part of the answer.
    forwards, positions: running totals of this choice: model forwards it took part in; positions evaluated.
    cached_tokens: prompt tokens whose K/V came from the prefix cache.
    queue_seconds: from its arrival to its place among the running; prefill_seconds: from there to its first tokens.
    """

    request_id: str
    choice: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    forwards: int = 0
    positions: int = 0
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and monotonic counters of the engine, published with outputs and at least twice a second.

    Those by a name are documented in `counters.py`. forwards_by_kind: prefill, commit, denoise, mixed, idle.
    """

    running: int = 0
    waiting: int = 0
    oldest_waiting_seconds: float = 0.0  # since the arrival of the oldest choice that has not run yet
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0  # unreferenced but still holding a reusable prefix; not counted as free
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    forwards_by_kind: dict[str, int] = {}
    graph_forwards: int = 0  # replays of a captured graph
    graph_captures: int = 0
    prefill_positions: int = 0  # clean positions of prompts
    commit_positions: int = 0  # clean positions of generated text
    denoise_positions: int = 0
    padding_positions: int = 0  # run for nothing: to fill up a graph's size, or the room that a row turned out to need
    committed_tokens: int = 0
    commits_by_reason: dict[str, int] = {}
    edited_tokens: int = 0
    remasked_tokens: int = 0
    discarded_by_ending: dict[str, int] = {}  # decided but past a stop or max_tokens, or given up
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # drafts that were right
    cached_rows: int = 0  # rows that left part of their block or canvas to stale K/V
    refreshed_rows: int = 0  # rows that might have, and ran all of it
    blocks_finished: int = 0
    step_seconds: float = 0.0
    out_of_memory: int = 0  # forwards that did not fit
    forward_seconds: Distribution = Distribution()
    host_gap_seconds: Distribution = Distribution()
    forward_positions: Distribution = Distribution()
    forward_rows: Distribution = Distribution()
    steps_per_block: Distribution = Distribution()
    block_seconds: Distribution = Distribution()  # from one finished block of a choice to the next

    @property
    def forwards(self) -> int:
        return sum(self.forwards_by_kind.values())

    @property
    def discarded_tokens(self) -> int:
        return sum(self.discarded_by_ending.values())


class Outputs(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The outputs of one engine step (possibly none) and the engine's statistics."""

    outputs: list[ChoiceOutput] = []
    stats: EngineStats | None = None


class Fatal(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Last message of a dying engine."""

    error: str


EngineOutput = Ready | Outputs | Fatal
