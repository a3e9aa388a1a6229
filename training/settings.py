"""Options of a conversion's training stage."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from linocut.engine.errors import ConfigError

Mode = Literal["gated", "lora", "full"]
Context = Literal["token-causal", "block-causal"]
LogitSource = Literal["previous", "own"]
Layout = Literal["linocut", "fast-dllm-v2", "sdar"]

FLEX_BLOCK = 128  # rows and keys of one tile of flex attention's block mask


@dataclass
class AdaptSettings:
    """What to train, on what, for how long. Paths are folders; every default is for SmolLM2-135M on one H100.

    base: the autoregressive model. data: folders of answers. run: checkpoint, log and adapter. output: the converted
    folder. init_adapter: an adapter.safetensors to start from.

    mode: "gated" trains an adapter that acts on noisy rows only; "lora" one that acts on all rows and is merged;
    "full" all weights. layout: how the converted folder names its family.

    rows: packed rows of `length` clean tokens in one micro-batch; noisy_rows: noisy rows beside each of them (0: twice
    the length). accumulate: micro-batches of one update, in each process. segments: lengths m of noisy segments, one
    drawn per update with segment_weights. partial: probability of an update whose segments are partly masked.

    Weights of the loss: ce (data token), kl (to the frozen model), tv (total variation to it), certainty (dParallel,
    section 4.2), ar (KL of clean rows to the frozen model; not for gated). offset_decay: weight of a row is
    offset_decay ** offset. loss_share: share of the noisy rows that pass the head (a random, unbiased choice).

    The run ends with the first limit that is reached; the learning rate follows the share of it that is done.
    session_seconds ends this process early, with a checkpoint; the run goes on with the options that decide what is
    learnt unchanged (`checkpoint.identity`). compile, dtype: None lets the device choose.
    """

    base: str
    data: list[str]
    run: str
    output: str
    init_adapter: str | None = None

    mode: Mode = "gated"
    layout: Layout = "linocut"
    context: Context = "token-causal"
    logit_source: LogitSource = "previous"
    block_size: int = 4
    mask_token_id: int | None = None
    banned_ids: list[int] | None = None
    rank: int = 64
    scale: float = 2.0
    draft_head: bool = False

    length: int = 1024
    rows: int = 32
    noisy_rows: int = 0
    accumulate: int = 1
    segments: list[int] = field(default_factory=lambda: [2, 4, 8])
    segment_weights: list[float] = field(default_factory=list)
    partial: float = 0.25
    held_out: int = 256

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    certainty: float = 0.0
    certainty_temperature: float = 0.5
    ar: float = 0.3
    offset_decay: float = 1.0
    loss_share: float = 1.0
    head_chunk: int = 4096

    learning_rate: float | None = None
    draft_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    warm_up: float = 0.03
    final_share: float = 0.05

    max_seconds: float | None = None
    max_steps: int | None = None
    max_tokens: int | None = None
    session_seconds: float | None = None
    checkpoint_seconds: float = 120.0
    evaluate_seconds: float = 60.0
    log_every: int = 20
    seed: int = 0
    device: str | None = None
    dtype: Literal["bfloat16", "float32", "float64"] | None = None
    compile: bool | None = None
    peak_tflops: float = 989.0

    def __post_init__(self) -> None:
        self.noisy_rows = self.noisy_rows or 2 * self.length
        self.segment_weights = list(self.segment_weights) or [1.0] * len(self.segments)
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.mode == "full" else 1e-3
        self._check()

    def _check(self) -> None:
        if not self.segments or min(self.segments) < 1 or max(self.segments) > self.noisy_rows:
            raise ConfigError("segments must be lengths between 1 and noisy_rows")
        if len(self.segment_weights) != len(self.segments) or min(self.segment_weights) < 0:
            raise ConfigError("segment_weights must hold one non-negative weight for each segment length")
        if self.mode == "gated" and self.context == "block-causal":
            raise ConfigError("a gated adapter needs the context token-causal, or clean rows would change")
        if self.mode == "gated" and self.layout != "linocut":
            raise ConfigError(f"the layout {self.layout} holds no adapter: use the mode lora or full")
        if self.layout == "fast-dllm-v2" and (self.context, self.logit_source) != ("block-causal", "previous"):
            raise ConfigError("the layout fast-dllm-v2 needs the context block-causal and the logit source previous")
        if self.layout == "sdar" and (self.context, self.logit_source) != ("block-causal", "own"):
            raise ConfigError("the layout sdar needs the context block-causal and the logit source own")
        if self.draft_head and self.layout != "linocut":
            raise ConfigError(f"the layout {self.layout} holds no draft head")
        if not 0.0 <= self.partial <= 1.0 or not 0.0 < self.loss_share <= 1.0:
            raise ConfigError("partial and loss_share are shares between 0 and 1")
        if self.ce == self.kl == self.tv == 0.0:
            raise ConfigError("one of ce, kl and tv must be above 0")
        if min(self.length, self.rows, self.accumulate, self.rank, self.head_chunk, self.log_every) < 1:
            raise ConfigError("length, rows, accumulate, rank, head_chunk and log_every are at least 1")
        if self.max_seconds is None and self.max_steps is None and self.max_tokens is None:
            raise ConfigError("name a limit: max_seconds, max_steps or max_tokens")

    @property
    def shift(self) -> int:
        """Positions between a row and the token it predicts."""
        return 1 if self.logit_source == "previous" else 0

    @property
    def uses_teacher(self) -> bool:
        """Whether noisy rows learn from the frozen model's distribution."""
        return self.kl > 0 or self.tv > 0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def settings_from_dict(values: dict[str, Any]) -> AdaptSettings:
    """Settings from a JSON object. Raises ConfigError for a name that is no option or one that is missing."""
    known = {f.name for f in dataclasses.fields(AdaptSettings)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"no such option of the adapt stage: {', '.join(unknown)}")
    try:
        return AdaptSettings(**values)
    except TypeError as error:
        raise ConfigError(f"the settings are incomplete: {error}") from None


def load_settings(path: Path) -> AdaptSettings:
    """Settings from a JSON file. Raises ConfigError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as settings: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold an object")
    return settings_from_dict(values)
