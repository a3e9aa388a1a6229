"""Before the first request: steps of the sizes that serving will meet are run and captured."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

import msgspec

from .core import EngineCore
from .counters import SchedulerCounters
from .decoding.parameters import resolve
from .messages import AddRequest
from .params import DecodingParams, SamplingParams
from .step_clock import StepClock

# Concurrent requests, up to what the engine may run; a prompt and a text are a few blocks long.
CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPT = (12, 40)
TOKENS = 40
# Prompts, at least so long, that come at once and fill this many forwards: the first of a shape is run, the second one
# captured.
LONG_PROMPT, FULL_FORWARDS = 512, 3

log = logging.getLogger("linocut.engine")


def make_ready(core: EngineCore, strategies: tuple[str, ...] = ()) -> None:
    """Warm up with the default strategy and with these, where steps are captured. Raises ParameterError for a name that
    the model does not have."""
    if core.runner.graphs is None:
        return
    warm_up(core)
    for name in dict.fromkeys(strategies):
        if name != core.info.default_strategy:
            warm_up(core, resolve(core.info, {"strategy": name}))


def warm_up(core: EngineCore, decoding: DecodingParams | None = None, clients: tuple[int, ...] = CLIENTS) -> None:
    """Answer made-up prompts, more and more of them at once, and forget them: counters, and the pages' contents too.

    A full forward that does not fit into memory is met here: what forwards may hold from then on stays.

    decoding: how; None: the engine's default. The engine must be idle.
    """
    began, graphs = time.perf_counter(), core.runner.graphs
    try:
        with core.runner.learning():
            _answer(core, decoding, clients)
    except Exception:
        if core.runner.fusion.on:
            log.exception("warming up failed; --eager does without graphs and without what is compiled")
        raise
    core.scheduler.prefix.clear()
    core.scheduler.prefix.query_tokens = core.scheduler.prefix.hit_tokens = 0
    core.scheduler.counters, core.clock = SchedulerCounters(), StepClock()
    if graphs is not None:
        log.info("warmed up in %.1f s: %d shapes of steps", time.perf_counter() - began, graphs.captures)
        graphs.replays = graphs.captures = graphs.padding = 0


def _answer(core: EngineCore, decoding: DecodingParams | None, clients: tuple[int, ...]) -> None:
    info = core.info
    decoding = decoding or DecodingParams(strategy=info.default_strategy, values=info.default_parameters)
    draw = random.Random(0)
    special = {*info.stop_ids, *info.banned_ids, info.mask_id}
    ids = [i for i in range(min(info.vocab_size, 4096)) if i not in special]
    tokens = min(TOKENS, info.max_model_len - PROMPT[1])
    if tokens < 1:
        return
    length = min(max(LONG_PROMPT, -(-info.token_budget // info.max_running)), info.max_model_len - tokens)
    full = min(FULL_FORWARDS * info.token_budget // length, info.capacity)

    def ask(lengths: list[int], name: str, sampling: SamplingParams) -> None:
        for index, length in enumerate(lengths):
            prompt, key = draw.choices(ids, k=length), f"warm-up-{name}-{index}"
            core.add(AddRequest(request_id=key, prompt=prompt, sampling=sampling, decoding=decoding))
        while core.busy:
            core.step()

    # Greedy, and as a request is sampled that says nothing: the sampler's work is part of a shape.
    usual = {"temperature": 1.0, **info.default_sampling}
    for temperature in dict.fromkeys((0.0, usual["temperature"])):
        fields: dict[str, Any] = {**usual, "max_tokens": tokens, "temperature": temperature}
        sampling = msgspec.convert(fields, SamplingParams)
        for count in clients:
            # Twice: a shape is captured when it comes again.
            for turn in range(2 * (count <= info.max_running)):
                ask([draw.randint(*PROMPT) for _ in range(count)], f"{temperature}-{count}-{turn}", sampling)
        ask([length] * full, f"{temperature}-full", msgspec.structs.replace(sampling, max_tokens=1))
