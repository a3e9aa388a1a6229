"""From a canvas model's folder and a configuration to what `CanvasCore` runs."""

from __future__ import annotations

import logging

import torch

from linocut.kernels.backend import default_backend

from ..config import EngineConfig
from ..decoding.parameters import resolve
from ..decoding.registry import offered
from ..errors import ConfigError, ModelError, ParameterError
from ..family import FamilyTraits
from ..loading import default_sampling, read_config
from ..machine import choose_device, choose_dtype, device_name
from ..messages import ModelInfo
from ..models.source import resolve_model
from ..models.weights import WeightFiles
from .core import LoadedCanvas
from .discriminator import Discriminator
from .shape import CanvasShape, canvas_from_config
from .transformer import Denoiser

log = logging.getLogger("linocut.engine")

DISCRIMINATOR_FILE = "discriminator.safetensors"


def load_canvas(config: EngineConfig) -> LoadedCanvas:
    """Read the checkpoint, and the discriminator where there is one. Raises ModelError or ConfigError."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = resolve_model(config.model)
    raw, generation = read_config(folder)
    shape = canvas_from_config({**raw, **_ends(generation)}, config.mask_id, config.stop_ids)
    _refuse_what_does_not_apply(config, shape)
    if not shape.stop_ids:
        log.warning("no stop id is known: texts end at max_tokens only")
    device = choose_device(config)
    dtype = choose_dtype(config, shape, device)
    files = sorted(path.name for path in folder.glob("*.safetensors") if path.name != DISCRIMINATOR_FILE)
    denoiser = Denoiser(shape, WeightFiles(folder, torch.float32, device, files), dtype)
    reward = None
    if (folder / DISCRIMINATOR_FILE).exists():
        reward = Discriminator(shape, WeightFiles(folder, torch.float32, device, [DISCRIMINATOR_FILE]), dtype)
    traits = FamilyTraits(
        "canvas",
        "canvas",
        "own",
        shape.length,
        shape.length,
        shape.mask_id,
        shape.stop_ids,
        reward=reward is not None,
    )
    try:
        offer = offered(traits)
        defaults = resolve(offer, {"strategy": config.strategy, **config.strategy_parameters})
        for name in config.warm_up:
            resolve(offer, {"strategy": name})
    except ParameterError as error:
        raise ConfigError(f"{error.param.removeprefix('diffusion.')}: {error}") from None
    on_gpu = device.type == "cuda"
    info = ModelInfo(
        family=traits.name,
        context=traits.context,
        block_size=shape.length,
        vocab_size=shape.vocab,
        max_model_len=min(config.max_model_len or shape.max_model_len, shape.max_model_len),
        mask_id=shape.mask_id,
        stop_ids=shape.stop_ids,
        banned_ids=(),
        strategy_table=offer.strategy_table,
        default_strategy=defaults.strategy,
        default_parameters=defaults.values,
        default_sampling=default_sampling(generation),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        device_name=device_name(device),
        numerics=config.numerics,
        attention="torch",
        quantization=config.quantization,
        prefix_caching=False,
        token_budget=config.token_budget or (32 if on_gpu else 1) * shape.length,
        page_size=config.page_size,
        pages=0,
        max_running=config.max_running or (64 if on_gpu else 8),
        max_queued=config.max_queued,
    )
    return LoadedCanvas(info, shape, denoiser, reward, default_backend(device))


def _ends(generation: dict[str, object]) -> dict[str, object]:
    """What generation_config.json says of a text's ends, which wins over config.json."""
    return {name: generation[name] for name in ("bos_token_id", "eos_token_id") if generation.get(name) is not None}


def _refuse_what_does_not_apply(config: EngineConfig, shape: CanvasShape) -> None:
    """Raise ConfigError for settings of the other lane, instead of ignoring them, and for those that cannot fit."""
    foreign = {
        "quantization": config.quantization != "none",
        "attention": config.attention in ("triton", "flash"),
        "numerics": config.numerics != "fast",
        "block_size": config.block_size is not None,
        "kv_memory": config.kv_memory is not None,
        "tensor_parallel_size": config.tensor_parallel_size > 1,
    }
    for name, given in foreign.items():
        if given:
            raise ConfigError(f"{name} {getattr(config, name)} does not apply to a model of a fixed canvas")
    if config.random_weights:
        raise ModelError("random weights are not for models of a fixed canvas")
    if config.max_model_len is not None and config.max_model_len > shape.max_model_len:
        raise ConfigError(f"max_model_len {config.max_model_len} exceeds the canvas, which holds {shape.max_model_len}")
    if config.token_budget is not None and config.token_budget < shape.length:
        raise ConfigError(f"token_budget {config.token_budget} is less than the canvas, {shape.length} positions")
