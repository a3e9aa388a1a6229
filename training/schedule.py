"""The learning rate over a run."""

from __future__ import annotations

import math


def learning_rate_share(done: float, warm_up: float, final: float) -> float:
    """Linear warm-up, then a cosine from 1 to `final`, over the share of the run that is done."""
    if done < warm_up:
        return max(0.01, done / warm_up)
    turn = (done - warm_up) / max(1e-9, 1.0 - warm_up)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, turn)))
