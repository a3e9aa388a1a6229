"""Stages of a step as a few kernels each.

Around its forward a step is some 400 operations on a few numbers a row. On a GPU each is a kernel that takes a
microsecond, which is a tenth of a small model's step; `torch.compile` makes a few kernels of a stage.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

from .models.embedded import cache_root

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("linocut.engine")

# A stage is compiled anew for each strategy, for one row and many, and for what the rows ask of the sampler.
_VARIANTS = 32


class Fusion:
    """Compiles the functions that it is called with, where it is `on`.

    Only while `learning`: a compilation takes seconds. Variants that are met at other times run operation by operation,
    to the same effect. backend: of torch.compile. seconds: spent in stages while learning.
    """

    def __init__(self, on: bool, backend: str | Callable[..., Any] = "inductor") -> None:
        self.on, self._backend = on, backend
        self._stance = "force_eager"
        self.is_learning, self.seconds = False, 0.0
        if on:
            from torch._dynamo import config  # takes a second to import, which a CPU can do without

            config.recompile_limit = max(config.recompile_limit, _VARIANTS)
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))

    @contextmanager
    def learning(self, really: bool = True) -> Iterator[None]:
        """Within it, new variants are compiled; behind it, those that are there are used. really: False changes
        nothing."""
        before = self._stance, self.is_learning
        if really:
            self._stance, self.is_learning = "default", True
        try:
            yield
        finally:
            self._stance, self.is_learning = ("eager_on_recompile", False) if really else before

    def __call__(self, stage: F) -> F:
        """`stage`, which takes what its operations depend on as arguments and has no condition on a tensor's values."""
        if not self.on:
            return stage
        fused = torch.compile(stage, backend=self._backend, fullgraph=True)

        @wraps(stage)
        def run(*args: Any) -> Any:
            if not self.on:
                return stage(*args)
            began = time.perf_counter()
            # Within the capture of a graph a compilation would be an error of the device.
            stance = "eager_on_recompile" if _is_capturing() else self._stance
            try:
                with torch.compiler.set_stance(stance):
                    return fused(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                # Raised before anything ran. What is left are more launches.
                log.warning("%s is not compiled, nor is what follows: %s", stage.__name__, str(error)[:300])
                self.on = False
                return stage(*args)
            finally:
                if self.is_learning:
                    self.seconds += time.perf_counter() - began

        return run  # type: ignore[return-value]


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
