"""From a model folder and a configuration to a runner: what fits this machine, resolved once at start."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linocut.kernels.backend import Backend, default_backend

from .cache.pages import PagePool
from .cache.prefix import PrefixCache
from .config import EngineConfig
from .decoding.parameters import resolve, strategies_for
from .errors import ConfigError, ModelError
from .family import FamilyTraits, family_from_config
from .messages import ModelInfo
from .models.backbone import Backbone, backbone_from_config
from .models.decoder import Decoder, allocate_cache
from .models.weights import RandomWeights, WeightFiles
from .runner import ModelRunner
from .scheduler import Scheduler
from .state import FIRST_DRAFT, allocate_state

# K/V pages on a CPU unless the operator says otherwise.
CPU_KV_BYTES = 2 << 30
# Device memory left to activations, logits chunks and the allocator on CUDA.
CUDA_WORKSPACE = 3 << 30


@dataclass
class LoadedModel:
    info: ModelInfo
    traits: FamilyTraits
    backbone: Backbone
    runner: ModelRunner
    scheduler: Scheduler


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json (empty if absent). Raises ModelError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        generation = folder / "generation_config.json"
        generation_config = json.loads(generation.read_text()) if generation.exists() else {}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{folder}: config.json or generation_config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(generation_config, dict):
        raise ModelError(f"{path} does not hold an object")
    return config, generation_config


def load_model(config: EngineConfig) -> LoadedModel:
    """Read the checkpoint, size the caches, and put everything together. Raises ModelError or ConfigError."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = Path(config.model)
    raw, generation = read_config(folder)
    traits = family_from_config(raw, generation, config.block_size, config.mask_id)
    if config.stop_ids is not None:
        traits = dataclasses.replace(traits, stop_ids=config.stop_ids)
    backbone = backbone_from_config(raw)
    device = _device(config)
    dtype = _dtype(config, backbone, device)
    backend: Backend = default_backend(device) if config.attention == "auto" else config.attention
    defaults = resolve(traits, {"strategy": config.strategy, **config.strategy_parameters})

    positions = (config.max_model_len or backbone.max_positions) + traits.block_size + 2 * FIRST_DRAFT
    weights = RandomWeights(dtype, device) if config.random_weights else WeightFiles(folder, dtype, device)
    decoder = Decoder(
        backbone,
        weights,
        fused_norm=traits.fused_norm,
        positions=positions,
        dtype=dtype,
        device=device,
        quantization=config.quantization,
        backend=backend,
    )
    pages = _pages(config, backbone, traits, dtype, device)
    # The longest request must fit the pool by itself, its last block included; page 0 is padding.
    room = (pages - 1) * config.page_size - traits.block_size
    max_model_len = min(config.max_model_len or backbone.max_positions, room)
    if config.max_model_len and config.max_model_len > room:
        raise ConfigError(f"max_model_len {config.max_model_len} needs more K/V pages than the {pages} that fit")

    max_running = config.max_running or (32 if device.type == "cpu" else 256)
    token_budget = config.token_budget or (512 if device.type == "cpu" else 8192)
    widest = max(2 * traits.block_size, FIRST_DRAFT)
    if token_budget < widest:
        raise ConfigError(f"token_budget {token_budget} is less than the widest row, {widest} positions")
    length = max_model_len + traits.block_size + 2 * FIRST_DRAFT
    table = -(-length // config.page_size)
    state = allocate_state(max_running, length, table, device)
    cache = allocate_cache(backbone, pages, config.page_size, dtype, device)
    runner = ModelRunner(
        decoder,
        cache,
        state,
        traits,
        reference=config.numerics == "reference",
        graphs=device.type == "cuda" and backend == "triton" and not config.eager,
    )
    pool = PagePool(pages)
    fingerprint = f"{traits.context}/{traits.block_size}/start"
    prefix = PrefixCache(pool, config.page_size, traits.block_size, fingerprint, config.prefix_caching)
    scheduler = Scheduler(pool, prefix, page_size=config.page_size, max_running=max_running, token_budget=token_budget)
    info = ModelInfo(
        family=traits.name,
        context=traits.context,
        block_size=traits.block_size,
        vocab_size=backbone.vocab,
        max_model_len=max_model_len,
        mask_id=traits.mask_id,
        stop_ids=traits.stop_ids,
        banned_ids=traits.banned_ids,
        strategies=strategies_for(traits),
        default_strategy=defaults.strategy,
        default_parameters=defaults.values,
        default_sampling=_default_sampling(generation),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        numerics=config.numerics,
        attention=backend,
        quantization=config.quantization,
        prefix_caching=config.prefix_caching,
        token_budget=token_budget,
        page_size=config.page_size,
        pages=pages - 1,
        max_running=max_running,
        max_queued=config.max_queued,
    )
    return LoadedModel(info, traits, backbone, runner, scheduler)


def _default_sampling(generation: dict[str, Any]) -> dict[str, float]:
    names = ("temperature", "top_p", "top_k", "min_p")
    given = {name: generation[name] for name in names if isinstance(generation.get(name), (int, float))}
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    return {name: float(value) for name, value in given.items()}


def _device(config: EngineConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(f"device {config.device!r} is not a device name") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {config.device!r} is not supported (cpu and cuda are)")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no CUDA device")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _dtype(config: EngineConfig, backbone: Backbone, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    if device.type == "cuda":
        return torch.float16 if backbone.dtype == "float16" else torch.bfloat16
    # Without bf16 instructions a CPU emulates it, several times slower than float32.
    return torch.bfloat16 if backbone.dtype != "float32" and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16 or AMX)."""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _pages(
    config: EngineConfig, backbone: Backbone, traits: FamilyTraits, dtype: torch.dtype, device: torch.device
) -> int:
    """How many pages the K/V memory holds, padding page included."""
    per_page = backbone.kv_bytes_per_position(dtype.itemsize) * config.page_size
    if config.kv_memory is not None:
        memory = config.kv_memory
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = int(total * config.memory_fraction) - (total - free) - CUDA_WORKSPACE
    else:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = min(CPU_KV_BYTES, available // 4)
    # No more than every running sequence at full length could use.
    length = (config.max_model_len or backbone.max_positions) + traits.block_size
    most = (config.max_running or 256) * -(-length // config.page_size) + 1
    pages = min(memory // per_page, most)
    if pages < 2 + traits.block_size // config.page_size:
        raise ConfigError(f"{memory} bytes of K/V memory hold no sequence: a page takes {per_page} bytes")
    return int(pages)
