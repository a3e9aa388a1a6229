"""What a forward leaves for those who decide: hidden states, and the vocabulary's product with some of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import StepInputs, StepShape
from .logit_rows import LogitRows, ToLogits
from .models.decoder import Decoder
from .segments import certain_sources


@dataclass
class Forward:
    """hidden: [tokens, hidden]. logits: the rows asked before anything is decided; of_targets gives their logits,
    to_logits those of any rows, and ahead those of the rows that draft, where they are known by then."""

    shape: StepShape
    inputs: StepInputs
    hidden: Tensor
    logits: LogitRows | None
    to_logits: ToLogits
    of_targets: ToLogits
    ahead: ToLogits | None = None


def read_vocabulary(
    decoder: Decoder,
    shape: StepShape,
    inputs: StepInputs,
    hidden: Tensor,
    targets: LogitRows | None,
    *,
    joint: bool,
    lead: int | None,
) -> Forward:
    """Where it can, once for what is asked before a decision and behind it.

    joint: all positions become logits, whichever will be asked. lead: masks of a draft segment that propose nothing, if
    the rows that will draft are known before anything is decided; else None.
    """

    def fresh(rows: LogitRows) -> Tensor:
        return decoder.logits(hidden[rows.source])

    if targets is None or not shape.scratch:
        return Forward(shape, inputs, hidden, targets, fresh, fresh)
    if joint:
        # Which segment drafts is not known yet, nor does the shape say how many there are.
        of_all = decoder.logits(hidden)

        def known(rows: LogitRows) -> Tensor:
            return of_all[rows.source]

        return Forward(shape, inputs, hidden, targets, known, known, known)
    if lead is not None:
        sources = torch.cat([targets.source, certain_sources(shape.groups[0], inputs, lead)])
        both = decoder.logits(hidden[sources])
        # So few rows that all targets, or all drafts, are asked for at once.
        certain = (lambda rows: both[: shape.logits]), (lambda rows: both[shape.logits :])
        return Forward(shape, inputs, hidden, targets, fresh, *certain)
    return Forward(shape, inputs, hidden, targets, fresh, fresh)
