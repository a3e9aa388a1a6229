"""Documents that are not trained on, and how the network does on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .documents import Documents, Ints, gather_rows, pack_rows
from .loss import LossWeights
from .network import Counts, Network, make_batch
from .processes import Processes
from .segments import Noise, draw_segments
from .settings import AdaptSettings
from .tally import Tally


class HeldOut:
    """Held-out documents, packed into batches of the training shape."""

    def __init__(self, settings: AdaptSettings, documents: Documents, numbers: Ints, processes: Processes) -> None:
        """documents: on the device; numbers: those of the held-out ones."""
        self._settings, self._documents, self._processes = settings, documents, processes
        self._batches: list[Tensor] = []  # [rows, documents] each
        if len(numbers):
            packed = torch.from_numpy(pack_rows(documents.lengths.cpu().numpy(), numbers, settings.length, seed=1))
            missing = -len(packed) % settings.rows
            padding = torch.full((missing, packed.shape[1]), -1, dtype=packed.dtype)
            self._batches = list(torch.cat([packed, padding]).to(processes.device).split(settings.rows))

    @torch.no_grad()
    def evaluate(self, network: Network, weights: LossWeights) -> dict[str, Any]:
        """Cross-entropy and accuracy by offset, always with the same noise. The processes share the batches."""
        s, processes = self._settings, self._processes
        tally, longest = Tally(processes.device), max(s.segments)
        one = torch.ones((), device=processes.device)
        for partial in (False, True):
            for number, members in enumerate(self._batches):
                if number % processes.world != processes.rank:
                    continue
                rows = gather_rows(self._documents, members, s.length)
                generator = torch.Generator(processes.device).manual_seed(number)
                segments = draw_segments(rows, Noise(longest, partial), s, generator)
                batch = make_batch(s, rows, segments, longest, partial, generator)
                output = network.forward(batch, Counts(one, one), weights, everything=True)
                tally.add_batch(batch, output, s.context)
                if not partial:
                    shape = segments.weight.shape
                    tally.add_runs(output.noisy.correct.view(shape), segments.weight, longest)
                    if output.draft is not None:
                        tally.add_runs(output.draft.correct.view(shape), segments.weight, longest, draft=True)
        processes.add(tally.by_offset)
        processes.add(tally.scalars)
        return tally.read()
