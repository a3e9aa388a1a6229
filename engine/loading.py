"""From a model folder and a configuration to a runner: what fits this machine, resolved once at start."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from .attention_choice import choose_attention, compile_variants
from .cache.pages import PagePool
from .cache.prefix import PrefixCache
from .config import GPU_TOKEN_BUDGET, EngineConfig
from .decoding.filter import FILE as FILTER_FILE
from .decoding.filter import read_filter
from .decoding.parameters import resolve
from .decoding.registry import offered, strategy_classes
from .decoding.strategy import Equipment
from .errors import ConfigError, ModelError, ParameterError
from .family import FamilyTraits, family_from_config
from .machine import choose_device, choose_dtype, device_name, forward_ms, page_count, release_memory, row_share
from .messages import ModelInfo
from .models.backbone import Backbone, backbone_from_config
from .models.decoder import Decoder, allocate_cache
from .models.source import resolve_model
from .models.weights import RandomWeights, WeightFiles
from .parallel.ranks import ALONE, Ranks
from .parallel.split import check_split, part_of
from .params import SamplingParams
from .runner import ModelRunner
from .scheduler import Scheduler
from .state import FIRST_DRAFT, allocate_state

# Bound of a canvas (prompt, text and suffix) and what of it is for the text, unless the operator or a request says so.
MAX_CANVAS = 4096
DEFAULT_CANVAS = 256

log = logging.getLogger("linocut.engine")


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


def load_model(config: EngineConfig, ranks: Ranks = ALONE) -> LoadedModel:
    """Read the checkpoint, size the caches, and put everything together. Raises ModelError or ConfigError.

    ranks: as many as config.tensor_parallel_size, of which this process holds its part of the model; each of them
    calls this at the same time.
    """
    if config.tensor_parallel_size != ranks.size:
        raise ConfigError(f"tensor_parallel_size {config.tensor_parallel_size} where {ranks.size} load the model")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = resolve_model(config.model)
    raw, generation = read_config(folder)
    traits = family_from_config(raw, generation, config.block_size, config.mask_id)
    backbone = backbone_from_config(raw)
    if raw.get("quantization_config"):
        raise ModelError("quantised checkpoints are not supported: use the one in bfloat16, float16 or float32")
    traits = dataclasses.replace(
        traits,
        stop_ids=_known_ids(
            "stop ids", traits.stop_ids if config.stop_ids is None else config.stop_ids, backbone.vocab
        ),
        banned_ids=_known_ids("banned ids", traits.banned_ids, backbone.vocab),
        has_filter=(folder / FILTER_FILE).exists(),
    )
    check_split(backbone, ranks.size)
    device = choose_device(config) if ranks.device is None else ranks.device
    dtype = choose_dtype(config, backbone, device)
    backend, flash = choose_attention(config, part_of(backbone, ranks.size), dtype, device)
    try:
        offer = offered(traits)
        defaults = resolve(offer, {"strategy": config.strategy, **config.strategy_parameters})
        expected = [defaults, *(resolve(offer, {"strategy": name}) for name in config.warm_up)]
    except ParameterError as error:
        raise ConfigError(f"{error.param.removeprefix('diffusion.')}: {error}") from None

    positions = (config.max_model_len or backbone.max_positions) + traits.overhang + 2 * FIRST_DRAFT
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
        flash=flash,
        adapter_rank=_adapter_rank(raw) if traits.gated else 0,
        mask_id=traits.mask_id,
        draft_head=not config.random_weights and "draft_head.input" in weights,
        ranks=ranks,
    )
    if ranks.size > 1:
        release_memory(device)  # what was read whole to be cut
    pages = ranks.least(page_count(config, decoder.part, traits, dtype, device))
    # The longest request must fit the pool by itself, its last block included; page 0 is padding.
    room = (pages - 1) * config.page_size - traits.overhang
    max_model_len = min(config.max_model_len or backbone.max_positions, room)
    if traits.context == "full" and config.max_model_len is None:
        # Every forward of a canvas may run all of it, so its length is bounded by what a forward may hold.
        max_model_len = min(max_model_len, config.token_budget or MAX_CANVAS)
    if config.max_model_len is None and room < backbone.max_positions:
        log.warning(
            "K/V memory holds %d of the model's %d positions: --kv-memory sets it", room, backbone.max_positions
        )
    if config.max_model_len and config.max_model_len > room:
        raise ConfigError(f"max_model_len {config.max_model_len} needs more K/V pages than the {pages} that fit")

    max_running = config.max_running or (32 if device.type == "cpu" else 256)
    token_budget = config.token_budget or (512 if device.type == "cpu" else GPU_TOKEN_BUDGET)
    if traits.context == "full" and config.token_budget is None:
        token_budget = max(token_budget, max_model_len)
    widest = max_model_len if traits.context == "full" else max(2 * traits.block_size, FIRST_DRAFT)
    if token_budget < widest:
        raise ConfigError(f"token_budget {token_budget} is less than the widest row, {widest} positions")
    length = max_model_len + traits.overhang + 2 * FIRST_DRAFT
    table = -(-length // config.page_size)
    # Behind the rows of sequences, an idle one for each strategy.
    state = allocate_state(max_running + len(strategy_classes()), length, table, device)
    cache = allocate_cache(decoder.part, pages, config.page_size, dtype, device)
    runner = ModelRunner(
        decoder,
        cache,
        state,
        traits,
        rows=max_running,
        reference=config.numerics == "reference",
        graphs=device.type == "cuda" and backend == "triton" and config.numerics == "fast" and not config.eager,
        row_share=row_share(device, dtype, config.quantization, backend, backbone.parameters),
        equipment=Equipment(read_filter(folder, device)),
    )
    if runner.graphs is not None:
        # Here, where each rank is; one alone warms up.
        drafts = any(runner.strategies[one.strategy].segment(one.values, traits) for one in expected)
        compile_variants(
            decoder,
            cache,
            rows=max_running,
            tokens=token_budget,
            visible=max_model_len + traits.overhang,
            drafts=drafts,
        )
    pool = PagePool(pages)
    fingerprint = f"{traits.context}/{traits.block_size}/start"
    # Token-causal K/V does not depend on blocks, and that of a canvas on all of it.
    unit = traits.block_size if traits.context == "block-causal" else 1
    prefix_caching = config.prefix_caching and traits.context != "full"
    prefix = PrefixCache(pool, config.page_size, unit, fingerprint, prefix_caching)
    scheduler = Scheduler(
        pool,
        prefix,
        page_size=config.page_size,
        max_running=max_running,
        token_budget=token_budget,
        row_share=runner.row_share,
        forward_ms=forward_ms(backbone.parameters),
        shortens=not runner.rounding,
    )
    info = ModelInfo(
        family=traits.name,
        context=traits.context,
        block_size=traits.block_size,
        vocab_size=backbone.vocab,
        max_model_len=max_model_len,
        default_max_tokens=min(DEFAULT_CANVAS, max_model_len) if traits.context == "full" else None,
        mask_id=traits.mask_id,
        stop_ids=traits.stop_ids,
        banned_ids=traits.banned_ids,
        strategy_table=offer.strategy_table,
        default_strategy=defaults.strategy,
        default_parameters=defaults.values,
        default_sampling=default_sampling(generation),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        device_name=device_name(device),
        numerics=config.numerics,
        attention="triton, flash" if flash is not None else backend,
        quantization=config.quantization,
        prefix_caching=prefix_caching,
        token_budget=token_budget,
        page_size=config.page_size,
        pages=pages - 1,
        max_running=max_running,
        max_queued=config.max_queued,
    )
    return LoadedModel(info, traits, backbone, runner, scheduler)


def _adapter_rank(config: dict[str, Any]) -> int:
    try:
        return int(config["linocut"]["adapter"]["rank"])
    except (KeyError, TypeError, ValueError):
        raise ModelError("config.json's linocut.adapter names no rank") from None


def default_sampling(generation: dict[str, Any]) -> dict[str, float]:
    """The checkpoint's own sampling defaults; values that no request could have are left out, with a warning."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    types = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}
    found: dict[str, float] = {}
    for name in ("temperature", "top_p", "top_k", "min_p"):
        value = generation.get(name)
        if value is None:
            continue
        try:
            found[name] = float(msgspec.convert(value, types[name]))
        except (msgspec.ValidationError, OverflowError):
            log.warning("generation_config.json: %s %r is not usable and is ignored", name, value)
    return found


def _known_ids(what: str, ids: tuple[int, ...], vocab: int) -> tuple[int, ...]:
    strange = [i for i in ids if not 0 <= i < vocab]
    if strange:
        log.warning("%s %s are outside the vocabulary of %d and are ignored", what, strange[:8], vocab)
    return tuple(i for i in ids if 0 <= i < vocab)
