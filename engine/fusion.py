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
from torch import Tensor

from .models.embedded import cache_root

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("linocut.engine")

# A stage is compiled anew for each strategy, for one row and many, and for what the rows ask of the sampler.
_VARIANTS = 64
# Arithmetic as it is operation by operation: what a row gets must not depend on which variants there are.
_AS_WRITTEN = ("emulate_precision_casts", "eager_numerics.division_rounding")


class Fusion:
    """Compiles the functions that it is called with, where it is `on`.

    Only while `learning`: a compilation takes seconds. Variants that are met at other times run operation by operation,
    to the same effect but for the order in which floats are summed. backend: of torch.compile. seconds: spent in stages
    while learning. idle: set for steps that no graph will hold, whose launches the host pays anyway, and finding a
    variant on top.
    """

    def __init__(self, on: bool, backend: str | Callable[..., Any] = "inductor") -> None:
        self.on, self._backend = on, backend
        self.is_learning, self.idle, self.seconds = False, False, 0.0
        if on:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))

    @contextmanager
    def learning(self, really: bool = True) -> Iterator[None]:
        """Within it, new variants are compiled; behind it, those that are there are used. really: False changes
        nothing."""
        before, self.is_learning = self.is_learning, really or self.is_learning
        try:
            yield
        finally:
            self.is_learning = before

    def resizes(self, tensor: Tensor, dim: int) -> None:
        """Have variants that take `tensor` not depend on its size in `dim`."""
        if self.on:
            from torch._dynamo import maybe_mark_dynamic

            maybe_mark_dynamic(tensor, dim)

    def __call__(self, stage: F) -> F:
        """`stage`, which takes what its operations depend on as arguments and has no condition on a tensor's values."""
        if not self.on:
            return stage
        # Takes a second to import, which a CPU can do without.
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        options = _options() if self._backend == "inductor" else None
        fused = torch.compile(stage, backend=self._backend, fullgraph=True, options=options)
        # Whether there is any variant, and whether there may be more.
        some, more = False, True

        @wraps(stage)
        def run(*args: Any) -> Any:
            nonlocal some, more
            # Within the capture of a graph a compilation would be an error of the device.
            learns = self.is_learning and more and not _is_capturing()
            if not self.on or self.idle or not (learns or some):
                return stage(*args)
            began = time.perf_counter()
            try:
                # A limit holds in the thread that sets it.
                with (
                    config.patch(recompile_limit=_VARIANTS, accumulated_recompile_limit=16 * _VARIANTS),
                    torch.compiler.set_stance("default" if learns else "eager_on_recompile"),
                ):
                    result = fused(*args)
                some = True
                return result
            except FailOnRecompileLimitHit:
                log.warning("%s has %d variants, and gets no more", stage.__name__, _VARIANTS)
                more = False
            except TorchDynamoException as error:
                # Raised before anything ran. What is left are more launches.
                log.warning("%s is not compiled, nor is what follows: %s", stage.__name__, str(error)[:300])
                self.on = False
            finally:
                if self.is_learning:
                    self.seconds += time.perf_counter() - began
            return stage(*args)

        return run  # type: ignore[return-value]


def _options() -> dict[str, Any]:
    """Those of `_AS_WRITTEN` that this release of torch has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {name: True for name in _AS_WRITTEN if name in known}


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
