"""The log-linear noise schedule of MDLM (arXiv 2406.07524), on a grid of equal steps. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

_NOISE_FLOOR = 1e-3  # alpha(1): a position is never masked for certain
_LAST_TIME = 1e-5


@dataclass(frozen=True)
class Transition:
    """One step from time t to an earlier time s. alpha: the chance that a position is not masked; sigma: -log alpha."""

    alpha_t: float
    alpha_s: float

    @property
    def sigma_t(self) -> float:
        return -math.log(self.alpha_t)

    @property
    def sigma_s(self) -> float:
        return -math.log(self.alpha_s)


def transition(step: int, steps: int) -> Transition:
    """Step `step` of 0..steps-1; step `steps` is the last one, which decides whatever is still masked."""
    if step == steps:
        return Transition(_alpha(_LAST_TIME), 1.0)
    return Transition(_alpha(_time(step, steps)), _alpha(_time(step + 1, steps)))


def _time(step: int, steps: int) -> float:
    return 1.0 - (1.0 - _LAST_TIME) * step / steps


def _alpha(time: float) -> float:
    return 1.0 - (1.0 - _NOISE_FLOOR) * time
