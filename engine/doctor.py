"""What this machine can run: its device, its memory, its kernels, and what a model leaves for the K/V pages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import torch

from linocut.kernels.backend import default_backend
from linocut.kernels.check import self_test

from .bench.run import machine
from .config import EngineConfig
from .cores import Core, load_core
from .decoding.parameters import resolve
from .errors import LinocutError
from .machine import available_memory, choose_device, cpu_has_bf16
from .messages import AddRequest
from .params import SamplingParams

# What the model is asked to write.
TOKENS = 32


@dataclass(frozen=True)
class Finding:
    """A line of the report; `ok` is false where something does not work."""

    name: str
    text: str
    ok: bool = True


def examine(config: EngineConfig, find_model: Callable[[], str | None]) -> Iterator[Finding]:
    """Findings, each as soon as it is made.

    find_model: called when it is its turn; returns the folder of the model to load, None to load none.
    """
    try:
        device = choose_device(config)
    except LinocutError as error:
        yield Finding("device", str(error), ok=False)
        return
    yield from _device(device)
    yield _kernels(device)
    try:
        folder = find_model()
        if folder is not None:
            yield from _model(msgspec.structs.replace(config, model=folder, device=str(device)))
    except Exception as error:  # whatever it is, it is what the operator wants to know
        yield Finding("model", f"{type(error).__name__}: {error}", ok=False)


def _device(device: torch.device) -> Iterator[Finding]:
    yield Finding("device", f"{device}, {machine()['device']}")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        yield Finding("compute capability", f"{major}.{minor}, CUDA {torch.version.cuda}")
        yield Finding("device memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    else:
        yield Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")
        yield Finding("bfloat16", "in hardware" if cpu_has_bf16() else "not in hardware: float32 is faster")
    yield Finding("memory", f"{available_memory() / 2**30:.1f} GiB available")


def _kernels(device: torch.device) -> Finding:
    backend = default_backend(device)
    try:
        outcomes = self_test(str(device))
    except Exception as error:  # a compiler that is missing, a driver that is too old
        return Finding("kernels", f"{backend}: {type(error).__name__}: {error}", ok=False)
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    text = f"{backend}, {len(outcomes) - len(failed)} of {len(outcomes)} checks passed"
    return Finding("kernels", ": ".join([text, *failed[:3]]), ok=not failed)


def _model(config: EngineConfig) -> Iterator[Finding]:
    began = time.perf_counter()
    core = load_core(config)
    info = core.info
    yield Finding("model", f"{config.model}, {info.family}, loaded in {time.perf_counter() - began:.1f} s")
    yield Finding("numbers", f"{info.dtype}, quantization {info.quantization}, attention {info.attention}")
    if info.pages:
        positions = info.pages * info.page_size
        yield Finding("page budget", f"{info.pages} pages of {info.page_size} tokens: {positions} positions")
        longest = positions // info.max_model_len
        yield Finding("sequences", f"{longest} of {info.max_model_len} tokens together, or shorter ones up to "
                      f"{info.max_running}")  # fmt: skip
    yield _write(core)
    core.close()


def _write(core: Core) -> Finding:
    info = core.info
    length = min(TOKENS, info.max_model_len - 1)
    prompt = [next(token for token in range(info.vocab_size) if token not in {*info.banned_ids, *info.stop_ids})]
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    decoding = resolve(info, None, info.default_strategy, info.default_parameters)
    seconds, count = 0.0, 0
    for attempt in ("warm-up", "timed"):
        core.add(AddRequest(request_id=attempt, prompt=prompt, sampling=sampling, decoding=decoding))
        began, count = time.perf_counter(), 0
        while core.busy:
            for output in core.step():
                count += len(output.token_ids)
                if output.finish_reason == "error":
                    return Finding("writing", str(output.error), ok=False)
        seconds = time.perf_counter() - began
    return Finding("writing", f"{count} of {length} tokens in {seconds:.2f} s", ok=count == length)
