"""Canvas cores over tiny checkpoints, and what tests ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linocut.engine.canvas.core import CanvasCore
from linocut.engine.config import EngineConfig
from linocut.engine.cores import load_core
from linocut.engine.decoding.parameters import resolve
from linocut.engine.messages import AddRequest, ChoiceOutput
from linocut.engine.params import SamplingParams


def canvas_core(folder: Path, **config: Any) -> CanvasCore:
    fields = {"model": str(folder), "device": "cpu", "dtype": "float32", "check_invariants": True, **config}
    core = load_core(EngineConfig(**fields))
    assert isinstance(core, CanvasCore)
    return core


def request(core: CanvasCore, name: str, prompt: list[int], n: int = 1, **fields: Any) -> AddRequest:
    """fields: `diffusion` and those of SamplingParams; the answer fills the canvas unless they say otherwise."""
    decoding = resolve(core.info, fields.pop("diffusion", None))
    room = core.info.max_model_len - len(prompt)
    sampling = SamplingParams(**{"max_tokens": room, "seed": 7, "ignore_eos": True, **fields})
    return AddRequest(request_id=name, prompt=prompt, sampling=sampling, decoding=decoding, n=n)


def run(core: CanvasCore, *requests: AddRequest, delay: int = 0) -> dict[tuple[str, int], list[ChoiceOutput]]:
    """The outputs of each choice to its end; each request joins `delay` steps after the one before."""
    outputs: dict[tuple[str, int], list[ChoiceOutput]] = {}

    def step() -> None:
        for output in core.step():
            outputs.setdefault((output.request_id, output.choice), []).append(output)

    for added in requests:
        core.add(added)
        for _ in range(delay):
            step()
    while core.busy:
        step()
    return outputs


def answer(outputs: list[ChoiceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
