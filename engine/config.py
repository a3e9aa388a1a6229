"""The engine's one configuration object, validated at start and printed at start."""

from __future__ import annotations

from typing import Literal

import msgspec

from .errors import ConfigError
from .params import ParameterValue

# Positions of a forward on a GPU, unless the operator says so.
GPU_TOKEN_BUDGET = 8192


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Operator's choices; None means "choose from the model and the machine" (see `resolve` in core.py).

    model: a folder, or another name that `resolve_model` knows; every process of the engine looks it up for itself.
    token_budget: positions a forward may hold, prefill and denoise together.
    replica, replicas: this engine is one of several on its machine, counted from 0 (see `share_machine` in machine.py).
    kv_memory: bytes for the KV pages; on CUDA the default is `memory_fraction` of the card less weights and workspace.
    block_size: diffusion block of a block-causal model; it changes K/V, so it is one value per loaded model.
    warm_up: strategies that a GPU is made ready for at the start, besides the default one.
    tensor_parallel_size: processes that hold the model together, each on a device of its own.
    mask_id, stop_ids: replace the checkpoint's own, for folders whose config.json does not name them.
    """

    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    quantization: Literal["none", "int8"] = "none"
    attention: Literal["auto", "torch", "triton", "flash", "native"] = "auto"
    numerics: Literal["fast", "reference"] = "fast"
    eager: bool = False  # no CUDA graphs
    warm_up: tuple[str, ...] = ()
    block_size: int | None = None
    mask_id: int | None = None
    stop_ids: tuple[int, ...] | None = None
    replica: int = 0
    replicas: int = 1
    max_model_len: int | None = None
    max_running: int | None = None
    max_queued: int = 1024
    token_budget: int | None = None
    page_size: int = 16
    kv_memory: int | None = None
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    strategy: str | None = None
    strategy_parameters: dict[str, ParameterValue] = {}
    check_invariants: bool = False
    threads: int | None = None
    tensor_parallel_size: int = 1
    random_weights: bool = False  # benchmarks of a shape whose weights are not at hand

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise ConfigError(what)

        require(self.page_size >= 1 and self.page_size & (self.page_size - 1) == 0, "page_size must be a power of two")
        require(self.block_size is None or 1 <= self.block_size <= 256, "block_size must be between 1 and 256")
        require(0 <= self.replica < self.replicas, "replica must be at least 0 and below replicas")
        require(self.max_model_len is None or self.max_model_len >= 2, "max_model_len must be at least 2")
        require(self.max_running is None or self.max_running >= 1, "max_running must be at least 1")
        require(self.max_queued >= 0, "max_queued must not be negative")
        require(self.token_budget is None or self.token_budget >= 1, "token_budget must be at least 1")
        require(self.threads is None or self.threads >= 1, "threads must be at least 1")
        require(self.kv_memory is None or self.kv_memory >= 1, "kv_memory must be positive")
        require(self.tensor_parallel_size >= 1, "tensor_parallel_size must be at least 1")
        require(
            self.tensor_parallel_size == 1 or self.quantization == "none",
            "quantization int8 is not for tensor_parallel_size above 1: parts of a matrix would round in another way",
        )
        require(0.05 <= self.memory_fraction <= 0.98, "memory_fraction must be between 0.05 and 0.98")
