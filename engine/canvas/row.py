"""One choice on its canvas: what is pinned, what is decided, what has been answered. Imports torch for two tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..messages import AddRequest, ChoiceOutput, FinishReason
from .shape import CanvasShape


@dataclass
class CanvasRow:
    """tokens: [length] int64; undecided: [length] bool, true where it is masked. Decided positions never change.

    stops: ids that end the text, each with the position below which it is banned. step: denoising steps taken, each of
    them one forward of the denoiser.
    """

    request: AddRequest
    choice: int
    tokens: Tensor
    undecided: Tensor
    pinned: int
    first: int  # position of the answer, if an unprompted canvas begins as it should
    begin_id: int | None
    stops: dict[int, int]
    step: int = 0
    answered: list[int] = field(default_factory=list)
    read: int = 0  # positions that were looked at for the answer
    finish: FinishReason | None = None
    stop_token: int | None = None
    # For the metrics, as a Sequence has them.
    arrived: float = 0.0
    started: float = 0.0
    first_answered: float | None = None

    @property
    def steps(self) -> int:
        return int(self.request.decoding.values["steps"])

    def collect(self) -> list[int]:
        """The tokens by which the answer has grown: those up to the first mask, a stop or max_tokens.

        Masked diffusion never masks a position again, so they are final. Sets `finish` where the answer ends.
        """
        tokens, undecided = self.tokens.tolist(), self.undecided.tolist()
        new: list[int] = []
        while self.finish is None and self.read < len(tokens) and not undecided[self.read]:
            token, position = tokens[self.read], self.read
            self.read += 1
            if position == 0 and token == self.begin_id:
                continue  # it opens every text, and would end it as well
            new.append(token)
            if token in self.stops:
                self.finish, self.stop_token = "stop", token
            elif len(self.answered) + len(new) == self.request.sampling.max_tokens:
                self.finish = "length"
        self.answered += new
        return new

    def output(self, tokens: list[int], error: str | None = None) -> ChoiceOutput:
        return ChoiceOutput(
            request_id=self.request.request_id,
            choice=self.choice,
            token_ids=tokens,
            finish_reason=self.finish,
            stop_token=self.stop_token,
            error=error,
            forwards=self.step,
            positions=self.step * len(self.tokens),
            queue_seconds=self.started - self.arrived,
            prefill_seconds=(self.first_answered or self.started) - self.started,
        )

    def discarded(self) -> int:
        """Positions that were decided and are not part of the answer."""
        decided = len(self.tokens) - int(self.undecided.sum())
        return decided - self.pinned - len(self.answered)


def lay_out(shape: CanvasShape, request: AddRequest, choice: int, device: torch.device) -> CanvasRow:
    """A canvas of masks behind the prompt.

    A prompt is put behind the begin id, as every text was in training. Without a prompt nothing is pinned: the model
    draws the begin id itself, as its authors' sampler lets it.
    """
    prompt = list(request.prompt)
    if prompt and shape.begin_id is not None and prompt[0] != shape.begin_id:
        prompt.insert(0, shape.begin_id)
    tokens = torch.full((shape.length,), shape.mask_id, dtype=torch.int64)
    tokens[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    undecided = torch.arange(shape.length) >= len(prompt)
    first = len(prompt) or int(shape.begin_id is not None)
    sampling = request.sampling
    minimum = first + sampling.min_tokens
    stops = {stop: shape.length if sampling.ignore_eos else minimum for stop in shape.stop_ids}
    return CanvasRow(
        request=request,
        choice=choice,
        tokens=tokens.to(device),
        undecided=undecided.to(device),
        pinned=len(prompt),
        first=first,
        begin_id=shape.begin_id,
        stops=stops | {stop: minimum for stop in sampling.stop_token_ids},
        read=len(prompt),
    )
