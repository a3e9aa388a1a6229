"""The inference engine: scheduler, caches, decoding strategies, models.

`from linocut.engine import LLM` is the offline API. Names are resolved at first use, so that the server, which needs
only messages and parameters, does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig as EngineConfig
    from .llm import LLM as LLM
    from .llm import Completion as Completion
    from .params import SamplingParams as SamplingParams

_EXPORTS = {"LLM": ".llm", "Completion": ".llm", "EngineConfig": ".config", "SamplingParams": ".params"}


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module, __name__), name)
