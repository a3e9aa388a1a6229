"""A filter for the strategy `learned`: what it learns from, the training, and the file (Learn2PD, arXiv 2509.25188).

Our own engine makes the data: a reference text of each prompt, one position a forward, then the same text again as fast
as an oracle could write it. The paper trains on all positions of a block; ours on the undecided ones, since the
strategy asks about no others.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from linocut.engine.decoding.filter import FILE, Filter
from linocut.engine.errors import ConfigError
from linocut.engine.llm import LLM

from .filter_records import Records, collect, joined
from .filter_settings import FilterSettings
from .prompts import Message, read_exclusion, read_prompts

LOG = "filter.jsonl"
# Records of the log between the first and the last step.
LINES = 20

Say = Callable[[str], None]


def train_filter(settings: FilterSettings, say: Say = print) -> Path:
    """Collect, train, and write filter.safetensors and its log to `settings.out`. Raises ConfigError or ModelError."""
    began = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / LOG).open("w", encoding="utf-8") as log:
        parts = []
        for size in settings.block_sizes or (None,):
            records = _collected(settings, size, say)
            parts.append(records)
            _write(log, "collected", _described(records, time.perf_counter() - began))
        records = joined(parts)
        if not bool(records.counts.any()):
            raise ConfigError("the prompts gave no block to learn from")
        found, last = fit(records, settings, lambda record: _write(log, "train", record))
        seconds = round(time.perf_counter() - began, 1)
        _write(log, "end", {**last, "seconds": seconds})
    path = settings.out / FILE
    tensors = {name: getattr(found, name).contiguous() for name in ("w1", "b1", "w2", "b2")}
    sizes = ",".join(str(size) for size in settings.block_sizes) or str(found.length)
    save_file(tensors, path, {"format": "pt", "block_length": str(found.length), "block_sizes": sizes})
    say(f"{path}: {json.dumps(last)}, {seconds} s")
    return path


def fit(
    records: Records, settings: FilterSettings, note: Callable[[dict[str, Any]], None]
) -> tuple[Filter, dict[str, Any]]:
    """A filter trained on the CPU, all records in every step, and how good it is on the held-out prompts."""
    prompts = int(records.prompt.max()) + 1
    # Prompts stand in random order.
    measured = records.prompt >= prompts - max(round(prompts * settings.held_out), 1)
    if bool(measured.all()) or not bool(measured.any()):
        raise ConfigError("too few prompts gave blocks to learn from")
    train, held_out = _part(records, ~measured), _part(records, measured)
    length = records.confidence.shape[1]
    hidden = settings.hidden or max(32, length)
    generator = torch.Generator().manual_seed(settings.seed)

    def drawn(outputs: int, inputs: int) -> Tensor:
        bound = 1 / math.sqrt(inputs)
        return (torch.rand(outputs, inputs, generator=generator) * 2 - 1) * bound

    w1, b1 = drawn(hidden, length), drawn(hidden, length)[:, 0].clone()
    w2, b2 = drawn(length, hidden), drawn(length, hidden)[:, 0].clone()
    weights = [weight.requires_grad_() for weight in (w1, b1, w2, b2)]
    optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    last: dict[str, Any] = {}
    for step in range(settings.steps + 1):
        loss = _loss(train, w1, b1, w2, b2)
        if step % max(settings.steps // LINES, 1) == 0 or step == settings.steps:
            found = Filter(*(weight.detach().clone() for weight in weights))
            with torch.no_grad():
                held = float(_loss(held_out, *weights))
            last = {"step": step, "loss": round(loss.item(), 5), "held_out_loss": round(held, 5)}
            last |= measure(found, held_out, settings.threshold)
            note(last)
        if step < settings.steps:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return found, last


def measure(found: Filter, records: Records, threshold: float) -> dict[str, float | None]:
    """precision: of the positions above the threshold, the share that is right; recall: of the right ones, the share
    above it; share: of all positions, those that are right. None where there is nothing to divide by."""
    above = (found(records.confidence).sigmoid() > threshold) & records.counts
    right = records.right & records.counts
    hits = int((above & right).sum())

    def share(part: int, whole: int) -> float | None:
        return round(part / whole, 4) if whole else None

    return {
        "precision": share(hits, int(above.sum())),
        "recall": share(hits, int(right.sum())),
        "share": share(int(right.sum()), int(records.counts.sum())),
    }


def _loss(records: Records, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Mean over the positions that count. By matrix products, which `Filter` avoids for another reason."""
    logits = torch.relu(records.confidence @ w1.T + b1) @ w2.T + b2
    counts = records.counts.float()
    each = binary_cross_entropy_with_logits(logits, records.right.float(), reduction="none")
    return (each * counts).sum() / counts.sum()


def _collected(settings: FilterSettings, size: int | None, say: Say) -> Records:
    config = {"dtype": "float32", "prefix_caching": False, **settings.engine}
    if size is not None:
        config["block_size"] = size
    llm = LLM(str(settings.model), **config)
    prompts = _token_ids(llm, settings)
    say(f"{len(prompts)} prompts, blocks of {llm.core.info.block_size}")
    options: dict[str, Any] = {"max_tokens": settings.max_tokens, "temperature": 0.0, "diffusion": settings.diffusion}
    texts = [answer.token_ids for (answer,) in llm.generate([list(p) for p in prompts], **options)]
    records = collect(llm, prompts, texts)
    del llm
    gc.collect()
    return records


def _token_ids(llm: LLM, settings: FilterSettings) -> list[list[int]]:
    """Prompts that fit, all different, in an order that the seed draws."""
    exclusion = read_exclusion(settings.exclude)
    found, _ = read_prompts(settings.prompts, exclusion=exclusion, limit=settings.limit, seed=settings.seed)
    room = min(settings.prompt_limit, llm.core.info.max_model_len - settings.max_tokens)
    chosen: dict[tuple[int, ...], None] = {}
    for prompt in found:
        ids = tuple(_encoded(llm.tokenizer, prompt.messages))
        if 0 < len(ids) <= room:
            chosen[ids] = None
        if len(chosen) == settings.limit:
            break
    if len(chosen) < 2:
        raise ConfigError("fewer than two prompts fit the model and prompt_limit")
    return [list(ids) for ids in chosen]


def _encoded(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer.encode(messages[-1]["content"]))
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _part(records: Records, which: Tensor) -> Records:
    return Records(records.confidence[which], records.right[which], records.counts[which], records.prompt[which])


def _described(records: Records, seconds: float) -> dict[str, Any]:
    return {
        "block_length": records.confidence.shape[1],
        "records": len(records.confidence),
        "positions": int(records.counts.sum()),
        "right": int((records.right & records.counts).sum()),
        "seconds": round(seconds, 1),
    }


def _write(log: TextIO, kind: str, record: dict[str, Any]) -> None:
    log.write(json.dumps({"kind": kind, **record}) + "\n")
    log.flush()
