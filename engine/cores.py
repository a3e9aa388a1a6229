"""Which core runs a model: pages and prefixes, or a canvas."""

from __future__ import annotations

from typing import Protocol

from .canvas.core import CanvasCore
from .canvas.loading import load_canvas
from .canvas.shape import is_canvas
from .config import EngineConfig
from .core import EngineCore
from .loading import load_model, read_config
from .messages import Abort, AddRequest, ChoiceOutput, EngineStats, ModelInfo
from .models.source import resolve_model
from .parallel.core import ParallelCore
from .parallel.crew import Crew


class Core(Protocol):
    """What the engine process and the offline API need: requests in, steps, outputs. Nothing here does I/O.

    `add` and `validate` raise ParameterError, `add` before anything was queued; `abort` ignores what is unknown; `step`
    is called while `busy`. `close` ends what runs beside this process.
    """

    @property
    def info(self) -> ModelInfo: ...
    @property
    def busy(self) -> bool: ...
    def validate(self, request: AddRequest) -> None: ...
    def add(self, request: AddRequest) -> None: ...
    def abort(self, message: Abort) -> None: ...
    def step(self) -> list[ChoiceOutput]: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


def load_core(config: EngineConfig, crew: type[Crew] = Crew) -> Core:
    """Load the model of `config` into the core of its kind. crew: who starts further ranks.

    Raises ModelError or ConfigError.
    """
    raw, _ = read_config(resolve_model(config.model))
    if is_canvas(raw):
        return CanvasCore(load_canvas(config), check_invariants=config.check_invariants)
    if config.tensor_parallel_size > 1:
        return ParallelCore(config, crew)
    return EngineCore(load_model(config), check_invariants=config.check_invariants)
