"""Family traits: what distinguishes one diffusion language model from another, as data.

The engine has no code path named after a model; it reads these traits (design: ARCHITECTURE.md, "One idea").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ModelError

# Longest window of the families that feed their masks causally.
MAX_WINDOW = 64

Context = Literal["block-causal", "token-causal", "full", "canvas"]
LogitSource = Literal["own", "previous"]


@dataclass(frozen=True)
class FamilyTraits:
    """How a family of checkpoints is prefetched, denoised and committed.

    context: what a final token may see of the sequence before it (and, block-causal, of its own block); "canvas": one
        canvas of a fixed length, all of it, without K/V (see `canvas/`).
    logit_source: the row that predicts position p: p itself ("own"), or p - 1 ("previous": shifted families).
    block_size: positions decided together; 1 is autoregressive. Blocks lie on the grid 0, B, 2B, ...
    sub_block_size: positions of a block refined together, left to right; equal to block_size where there are none.
    commit_seeds: the next block's first position is decided by a clean forward of its own (shifted, block-causal; and
        where `commits_blocks`).
    commits_blocks: (token-causal) a block's tokens stay noise until all of them are decided. A causal forward makes
        them final then, and its last row decides the next block's first token (Nemotron-Labs-Diffusion). Elsewhere a
        token is final as soon as all before it are.
    commit_opens: the clean rows before a block decide its first position in the forward that also denoises the rest
        (shifted, token-causal: what a clean row predicts does not depend on the block).
    mask_id: token at undecided positions; None where there are none (autoregressive families).
    gated: an adapter acts on rows that are not final (masks, and tokens of a block that is being denoised).
    stop_ids: ids that end a text.
    in_block: whether the masks of a block see all of it, or only what is fed before them (WeDLM).
    grid: where blocks start: at the sequence's start, or at the prompt's end.
    has_filter: the folder holds a trained filter for the strategy `learned`.
    fused_norm: RMSNorm multiplies by the weight in float32 and rounds once (SDAR) instead of rounding before (Llama,
        Qwen, Fast-dLLM v2).
    reward: a discriminator guides the sampler (canvas models).
    routes_blocks: experts are chosen for a block together, so that every forward runs whole blocks (LLaDA2.2).
    edit_ids: the ids that delete a position and insert one before it, while a block is denoised (LLaDA2.2); or None.
    """

    name: str
    context: Context
    logit_source: LogitSource
    block_size: int
    sub_block_size: int
    mask_id: int | None
    stop_ids: tuple[int, ...]
    banned_ids: tuple[int, ...] = ()
    fused_norm: bool = False
    gated: bool = False
    in_block: Literal["bidirectional", "causal"] = "bidirectional"
    grid: Literal["sequence", "prompt"] = "sequence"
    has_filter: bool = False
    reward: bool = False
    commits_blocks: bool = False
    routes_blocks: bool = False
    edit_ids: tuple[int, int] | None = None

    @property
    def final_by_token(self) -> bool:
        """A decided token is final as soon as all before it are, whatever the rest of its block."""
        return self.context == "token-causal" and not self.commits_blocks

    @property
    def overhang(self) -> int:
        """Positions behind max_tokens that a step may run."""
        if self.context == "full":
            return 0
        return MAX_WINDOW if self.in_block == "causal" else self.block_size

    @property
    def commit_seeds(self) -> bool:
        return self.commits_blocks or (self.logit_source == "previous" and self.context == "block-causal")

    @property
    def commit_opens(self) -> bool:
        return self.logit_source == "previous" and self.context == "token-causal"


# Model type, see `model_type_of`, -> family name. Plain backbones are served autoregressively.
FAMILY_OF_MODEL_TYPE = {
    "llama": "ar",
    "qwen2": "ar",
    "qwen3": "ar",
    "qwen3_moe": "ar",
    "fast_dllm_qwen": "fast_dllm_v2",
    "sdar": "sdar",
    "sdar_moe": "sdar",
    "llada2_moe": "llada2",
    "llada": "llada",
    "lladamoe": "llada",
    "dream": "dream",
    "wedlm": "wedlm",
    "stable_diffcoder": "stable_diffcoder",
    "nemotron_labs_diffusion": "nemotron_labs_diffusion",
}

# Model type -> backbone (weight names and layer details).
BACKBONE_OF_MODEL_TYPE = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "fast_dllm_qwen": "qwen2",
    "sdar": "qwen3",
    "sdar_moe": "qwen3",
    "llada2_moe": "llada2",
    "llada": "llada",
    "lladamoe": "olmoe",
    "dream": "qwen2",
    "wedlm": "wedlm",
    "stable_diffcoder": "llama",
    "nemotron_labs_diffusion": "ministral3",
}

# Published mask ids, where a config.json does not name one (it normally should), by model type.
PUBLISHED_MASK_ID = {
    "fast_dllm_qwen": 151665,
    "sdar": 151669,
    "sdar_moe": 151669,
    "llada2_moe": 156895,
    "llada": 126336,
    "lladamoe": 156895,
    "dream": 151666,
    "wedlm": 151665,
    "stable_diffcoder": 5,
    "nemotron_labs_diffusion": 100,
}

# Published block sizes, likewise, by family.
PUBLISHED_BLOCK_SIZE = {"sdar": 4, "llada2": 32, "stable_diffcoder": 4, "nemotron_labs_diffusion": 32}

# Blocks of the models whose attention knows none: how much of a canvas is decoded at a time, unless a request says so.
CANVAS_BLOCK = 32


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)


def model_type_of(config: dict[str, Any]) -> str:
    """The model type of a config.json, lower case, and a type of our own where a checkpoint borrows another's:
    Stable-DiffCoder is published as "llama", LLaDA-MoE as "llada"."""
    named = str(config.get("model_type", "")).lower()
    if named == "llama" and any("diffcoder" in text.lower() for text in _architectures(config)):
        return "stable_diffcoder"
    if named == "llada" and config.get("num_experts"):
        return "lladamoe"
    return named


def family_from_config(
    config: dict[str, Any],
    generation_config: dict[str, Any] | None = None,
    block_size: int | None = None,
    mask_id: int | None = None,
) -> FamilyTraits:
    """Derive the traits of a checkpoint from its config.json and generation_config.json.

    A `linocut` object in config.json (written by `linocut convert`) adds `banned_ids`, and with `context` it makes a
    plain backbone a block-diffusion model. `block_size` and `mask_id` override the checkpoint's, except in
    autoregressive families. Raises ModelError for a model type that no family covers.
    """
    model_type = model_type_of(config)
    name = FAMILY_OF_MODEL_TYPE.get(model_type)
    if name is None:
        known = ", ".join(sorted(FAMILY_OF_MODEL_TYPE))
        raise ModelError(f"model_type {config.get('model_type')!r} is not supported (supported: {known})")
    own = config.get("linocut") or {}
    generation = generation_config or {}
    stop_ids = dict.fromkeys(_ids(generation.get("eos_token_id")) + _ids(config.get("eos_token_id")))
    stops, banned = tuple(stop_ids), _ids(own.get("banned_ids"))
    if name == "ar" and "context" in own:
        return _converted(own, int(config["vocab_size"]), stops, banned, block_size, mask_id)
    if name == "ar":
        if block_size not in (None, 1):
            raise ModelError(
                f"block_size {block_size} does not apply to an autoregressive model (model_type {model_type})"
            )
        return FamilyTraits(name, "token-causal", "previous", 1, 1, None, stops, banned)

    named = (mask_id, config.get("mask_token_id"), config.get("mask_id"), PUBLISHED_MASK_ID[model_type])
    mask = _checked_mask(_first_given(*named), int(config["vocab_size"]))
    if name == "fast_dllm_v2":
        size = block_size or int(config.get("bd_size", 32))
        return FamilyTraits(name, "block-causal", "previous", size, math.gcd(8, size), mask, stops, banned)
    if name in ("llada", "dream"):
        size = block_size or CANVAS_BLOCK
        source: LogitSource = "previous" if name == "dream" else "own"
        return FamilyTraits(name, "full", source, size, size, mask, stops, banned, grid="prompt")
    if name == "wedlm":
        if block_size is not None:
            raise ModelError("block_size does not apply to wedlm: its window is a parameter of requests")
        return FamilyTraits(name, "token-causal", "own", 1, 1, mask, stops, banned, in_block="causal")
    size = block_size or int(config.get("block_size") or PUBLISHED_BLOCK_SIZE[name])
    if name == "nemotron_labs_diffusion":
        grid: Literal["sequence", "prompt"] = "prompt"
        return FamilyTraits(
            name, "token-causal", "own", size, size, mask, stops, banned, grid=grid, commits_blocks=True
        )
    routes_blocks = name == "llada2" and bool(config.get("expert_capacity"))
    own_size = int(config.get("block_size") or PUBLISHED_BLOCK_SIZE[name])
    if routes_blocks and size != own_size:
        raise ModelError(f"block_size {size} is not the model's: it chooses experts by blocks of {own_size}")
    return FamilyTraits(
        name,
        "block-causal",
        "own",
        size,
        size,
        mask,
        stops,
        banned,
        fused_norm=name == "sdar",
        routes_blocks=routes_blocks,
        edit_ids=_edit_ids(config) if name == "llada2" else None,
    )


def _edit_ids(config: dict[str, Any]) -> tuple[int, int] | None:
    """LLaDA2.2's DELETE and SPLIT; None where config.json names neither."""
    delete, split = config.get("delete_token_id"), config.get("split_token_id")
    if delete is None and split is None:
        return None
    vocab = int(config["vocab_size"])
    if delete is None or split is None or delete == split or not all(0 <= int(i) < vocab for i in (delete, split)):
        raise ModelError(f"delete_token_id and split_token_id are no two ids of the vocabulary: {delete}, {split}")
    return int(delete), int(split)


def _architectures(config: dict[str, Any]) -> list[str]:
    found = [*(config.get("architectures") or ()), *(config.get("auto_map") or {}).values()]
    return [str(text) for text in found]


def _first_given(*values: Any) -> int:
    return next(int(value) for value in values if value is not None)


def _converted(
    own: dict[str, Any],
    vocab: int,
    stops: tuple[int, ...],
    banned: tuple[int, ...],
    block_size: int | None,
    mask_id: int | None,
) -> FamilyTraits:
    """The traits that `linocut convert` wrote into config.json."""
    try:
        context, source = own["context"], own["logit_source"]
        size = int(block_size or own["block_size"])
        mask = _checked_mask(int(own["mask_token_id"] if mask_id is None else mask_id), vocab)
    except KeyError as error:
        raise ModelError(f"config.json's linocut object lacks {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json's linocut object holds what is no number: {error}") from None
    if context not in ("token-causal", "block-causal") or source not in ("own", "previous") or size < 1:
        raise ModelError(f"config.json's linocut object is not valid: {context!r}, {source!r}, block size {size}")
    adapter = own.get("adapter")
    gated = adapter is not None
    if gated and (not isinstance(adapter, dict) or adapter.get("gate") != "noisy"):
        raise ModelError("config.json's linocut.adapter has no gate that is known (noisy is)")
    if gated and context != "token-causal":
        raise ModelError("config.json's linocut.adapter needs the context token-causal")
    return FamilyTraits("linocut", context, source, size, size, mask, stops, banned, gated=gated)


def _checked_mask(mask: int, vocab: int) -> int:
    if not 0 <= mask < vocab:
        raise ModelError(f"mask id {mask} is not in the vocabulary of {vocab}: name it in config.json or by --mask-id")
    return mask
