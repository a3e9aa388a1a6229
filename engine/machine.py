"""What this machine offers: device, dtype, memory for the K/V pages."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import torch

from linocut.kernels.backend import Backend
from linocut.kernels.native import instructions, multiplies_integers

from .config import EngineConfig
from .errors import ConfigError
from .family import FamilyTraits
from .models.backbone import Backbone
from .models.linear import has_integers

# K/V pages on a CPU unless the operator says otherwise.
CPU_KV_BYTES = 2 << 30
# Device memory left to activations, logits chunks and the allocator on CUDA.
CUDA_WORKSPACE = 3 << 30


class Stored(Protocol):
    """What the choice of a dtype depends on."""

    @property
    def dtype(self) -> str: ...


def choose_device(config: EngineConfig, count: int = 1) -> torch.device:
    """The configured device, or the first GPU, or the CPU. Raises ConfigError, also where fewer than `count` GPUs
    follow, itself included."""
    device = _first_device(config)
    if device.type == "cuda" and device.index + count > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size {count} from {device} on needs {device.index + count} GPUs; "
            f"torch sees {torch.cuda.device_count()}"
        )
    return device


def _first_device(config: EngineConfig) -> torch.device:
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


def choose_dtype(config: EngineConfig, backbone: Stored, device: torch.device) -> torch.dtype:
    """The configured dtype, or the checkpoint's where this device computes it in hardware."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    if device.type == "cuda":
        return torch.float16 if backbone.dtype == "float16" else torch.bfloat16
    if config.quantization == "int8" and multiplies_integers():
        return torch.float32  # that of the kernels in C, whose products are integers either way
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


def device_name(device: torch.device) -> str:
    """As people know it: the card, or the processor and how many of its threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's model, as far as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


# Parameters from which a forward of one position is bound by reading them, and not by being many kernels.
_LARGE = 10**9


def row_share(
    device: torch.device, dtype: torch.dtype, quantization: Literal["none", "int8"], backend: Backend, parameters: int
) -> float:
    """How much longer a forward takes for one more position, in forwards of one.

    Measured of SmolLM2-135M on two CPU cores and on an H200, and there of a Qwen2.5-7B, too.
    """
    if device.type == "cuda":
        return 0.005 if parameters >= _LARGE else 0.003
    # Products in integers of our own make the forward of one position cheap, not only the next one.
    if quantization == "int8" and not has_integers(quantization, backend):
        return 0.05
    if dtype == torch.bfloat16:
        return 0.02
    # Half as many lanes; and with torch's kernels the first position is dearer.
    return 0.16 if backend == "native" and instructions() == "AVX2" else 0.08


def forward_ms(parameters: int) -> float:
    """About how long a GPU's forward of few positions takes: an H200's of SmolLM2-135M, or of a Qwen2.5-7B."""
    return 4.0 if parameters >= _LARGE else 1.0


def page_count(
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
        memory = min(CPU_KV_BYTES, available_memory() // 4)
    # No more than every running sequence at full length could use.
    length = (config.max_model_len or backbone.max_positions) + traits.overhang
    most = (config.max_running or 256) * -(-length // config.page_size) + 1
    pages = min(memory // per_page, most)
    if pages < 2 + traits.overhang // config.page_size:
        raise ConfigError(f"{memory} bytes of K/V memory hold no sequence: a page takes {per_page} bytes")
    return int(pages)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward failed because an allocation did: the device is whole, and a smaller forward may fit."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Libraries' own allocations, and those of the CPU, have no type. Not among them: oneDNN's "could not create a
    # primitive". It keeps the failed one in its cache, so that forwards of the shape never work again.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("ALLOC_FAILED", "can't allocate memory", "not enough memory", "bad_alloc")
    )


def release_memory(device: torch.device) -> None:
    """Give back what the allocator holds in reserve, in pieces that may be too small for the next forward."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_memory() -> int:
    """Bytes that this process may still take, as far as the system and its control group say."""
    system = Path("/proc/meminfo")
    sizes = []
    if system.exists():
        line = next(line for line in system.read_text().splitlines() if line.startswith("MemAvailable"))
        sizes.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        sizes.append(int(limit.read_text()) - int(used.read_text()))
    return max(min(sizes), 0) if sizes else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def share_machine(config: EngineConfig) -> EngineConfig:
    """The configuration of one of several engines on this machine: a GPU of its own for each of its ranks, or its part
    of the processors.

    The GPUs are those from the configured one on. Raises ConfigError if there are not enough.
    """
    if config.replicas == 1:
        return config
    first, ranks = choose_device(config), config.tensor_parallel_size
    if first.type == "cpu":
        threads = config.threads or max(1, torch.get_num_threads() // (config.replicas * ranks))
        return msgspec.structs.replace(config, threads=threads)
    needed = first.index + config.replicas * ranks
    if needed > torch.cuda.device_count():
        raise ConfigError(
            f"{config.replicas} replicas of {ranks} GPUs from {first} on need {needed} GPUs, "
            f"not {torch.cuda.device_count()}"
        )
    return msgspec.structs.replace(config, device=f"cuda:{first.index + config.replica * ranks}")
