"""Which attention serves: chosen at start, and tried on a small case before anything depends on it."""

from __future__ import annotations

import logging
import os
import time

import torch

from linocut.kernels.attention_flash import FlashAttention, FlashUnavailableError, find_flash
from linocut.kernels.attention_self_test import TOLERANCE, attention_error
from linocut.kernels.attention_variants import compile_attention
from linocut.kernels.backend import Backend, default_backend
from linocut.kernels.native import load_native

from .config import EngineConfig
from .errors import ConfigError
from .models.backbone import Backbone
from .models.decoder import Decoder, KVCache
from .models.embedded import cache_root

log = logging.getLogger("linocut.engine")


def choose_attention(
    config: EngineConfig, part: Backbone, dtype: torch.dtype, device: torch.device
) -> tuple[Backend, FlashAttention | None]:
    """The backend of all kernels, and FlashAttention where it takes some forwards. part: what this rank holds.

    Raises ConfigError where what was asked for is not there, or where the chosen backend fails its self-test. With
    "auto", a FlashAttention that fails is left out, with a warning.
    """
    backend = _backend(config, part, dtype, device)
    _check("attention " + backend, _error(part, config, dtype, device, backend, None), dtype)
    if backend != "triton" or config.attention not in ("auto", "flash"):
        return backend, None
    if dtype not in (torch.bfloat16, torch.float16):
        if config.attention == "flash":
            raise ConfigError(f"attention flash takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}")
        return backend, None
    try:
        flash = FlashAttention(find_flash(device), everything=config.attention == "flash")
        error = _error(part, config, dtype, device, backend, flash)
        _check(f"attention flash ({flash.name})", error, dtype)
    except FlashUnavailableError as error:
        if config.attention == "flash":
            raise ConfigError(f"attention flash: {error}") from None
        return backend, None
    except (ConfigError, RuntimeError) as error:
        if config.attention == "flash":
            raise ConfigError(f"attention flash: {error}") from None
        log.warning("FlashAttention is left out, the Triton kernels serve: %s", str(error)[:300])
        return backend, None
    return backend, flash


def compile_variants(decoder: Decoder, cache: KVCache, *, rows: int, tokens: int, visible: int, drafts: bool) -> None:
    """Before a request has to wait for one: all that steps of so many rows, tokens and positions may ask of Triton's
    attention, which `decoder` is with. drafts: with segments of drafts, too."""
    began = time.perf_counter()
    heads, keys, values = decoder.part.heads, cache.keys[0], cache.values[0]
    count = compile_attention(heads, keys, values, rows=rows, tokens=tokens, visible=visible, scratch=drafts)
    log.info("%d variants of attention are ready after %.1f s", count, time.perf_counter() - began)


def _error(
    part: Backbone,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    flash: FlashAttention | None,
) -> float:
    return attention_error(part.heads, part.kv_heads, part.head_dim, config.page_size, dtype, device, backend, flash)


def _check(name: str, error: float, dtype: torch.dtype) -> None:
    if not error <= TOLERANCE[dtype]:
        raise ConfigError(
            f"{name} fails its self-test on this machine: off by {error:.2g} where {dtype} allows {TOLERANCE[dtype]:g}"
        )


def _backend(config: EngineConfig, part: Backbone, dtype: torch.dtype, device: torch.device) -> Backend:
    wanted = config.attention
    plain = default_backend(device) == "torch"
    if wanted in ("auto", "native") and plain and device.type == "cpu" and dtype == torch.float32:
        if load_native(cache_root() / "native"):
            return "native"
        if wanted == "native":
            raise ConfigError("attention native needs Linux, a CPU with AVX2 and a C compiler (cc, or CC names it)")
    if wanted == "native":
        raise ConfigError("attention native is for float32 on a CPU")
    if wanted in ("triton", "flash") and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"attention {wanted} needs a GPU")
    backend: Backend
    if wanted == "torch":
        backend = "torch"
    else:
        backend = default_backend(device) if wanted == "auto" else "triton"
    size = part.head_dim
    if backend == "triton" and (size < 16 or size & (size - 1)):
        if wanted != "auto":
            raise ConfigError(f"attention {wanted} takes head sizes that are powers of two, not {size}")
        log.warning("a head size of %d is not for the Triton kernels: the slower torch ones serve it", size)
        return "torch"
    return backend
