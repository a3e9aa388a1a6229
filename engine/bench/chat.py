"""Chat prompts for benchmarks: records of a file of JSON lines, drawn with a fixed seed, under the model's template."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Message = dict[str, str]

# Where files of prompts keep them, the first that a record has.
_FIELDS = ("messages", "prompt", "question", "instruction", "turns", "text")
SEED = 0


@dataclass(frozen=True)
class ChatPrompts:
    """messages, ids: one list for each prompt. skipped: drawn records whose prompt leaves no room for an answer."""

    source: str
    messages: list[list[Message]]
    ids: list[list[int]]
    skipped: int

    def as_dict(self) -> dict[str, Any]:
        lengths = [len(prompt) for prompt in self.ids]
        return {
            "source": self.source,
            "seed": SEED,
            "count": len(self.ids),
            "skipped": self.skipped,
            "prompt_tokens": sum(lengths) / len(lengths),
        }


def read_chat(path: Path, folder: Path, count: int, room: int) -> ChatPrompts:
    """`count` prompts of at most `room` tokens, rendered by the chat template in `folder`, or plain where it has none.

    Fewer if the file holds fewer. Raises ConfigError.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [messages for record in _records(path) if (messages := conversation(record))]
    random.Random(SEED).shuffle(found)
    kept: list[list[Message]] = []
    ids: list[list[int]] = []
    skipped = 0
    for messages in found:
        if len(ids) == count:
            break
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer.encode(text, add_special_tokens=False)
        else:
            prompt = tokenizer.encode(messages[-1]["content"])
        if 0 < len(prompt) <= room:
            kept.append(messages)
            ids.append(prompt)
        else:
            skipped += 1
    if not ids:
        raise ConfigError(f"{path} holds no prompt of at most {room} tokens in {', '.join(_FIELDS)}")
    return ChatPrompts(path.name, kept, ids, skipped)


def conversation(record: dict[str, Any]) -> list[Message]:
    """The messages up to the record's first user turn; empty if it has none. Of `turns`, the first is the prompt."""
    value = next((record[name] for name in _FIELDS if record.get(name)), None)
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else []
    messages: list[Message] = []
    for message in value if isinstance(value, list) else []:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return []
        messages.append({"role": str(message.get("role", "user")), "content": message["content"]})
        if messages[-1]["role"] == "user":
            return messages
    return []


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line) if line.strip() else None
                if isinstance(record, dict):
                    yield record
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON lines: {error}") from None
