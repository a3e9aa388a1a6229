"""A published shape without its weights, to be served with random ones, and a tokenizer of its vocabulary.

python -m loadtests.shape_model NAME FOLDER [--tiny]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from linocut.engine.bench.shapes import SHAPES, write_shape

from .scenarios import WORDS
from .tiny_model import TEMPLATE

START, END, MASK = "<|start|>", "<|end|>", "<|mask|>"
_SPACE = "Ġ"  # how byte-level vocabularies write it


def write_shape_model(name: str, folder: Path, tiny: bool = False) -> Path:
    """config.json of the shape, and what chat and texts need. tiny: two small layers instead. Returns the folder."""
    write_shape(name, folder, tiny)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = _tokenizer(config["vocab_size"], config["eos_token_id"], config.get("mask_token_id"))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _tokenizer(size: int, end: int, mask: int | None) -> Tokenizer:
    """Every id stands for some text: bytes, the words that scenarios use as one token each, made-up words."""
    fixed = {end: END, end - 1: START} | ({} if mask is None else {mask: MASK})
    free = iter(i for i in range(size) if i not in fixed)
    vocabulary = {letter: next(free) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())}
    merges = []
    for word in sorted(set(WORDS)):
        piece = _SPACE
        for letter in word:
            if piece + letter not in vocabulary:
                vocabulary[piece + letter] = next(free)
                merges.append((piece, letter))
            piece += letter
    for i in free:
        vocabulary[f"{_SPACE}{WORDS[i % len(WORDS)]}{i}"] = i
    vocabulary |= {text: i for i, text in fixed.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in fixed.values()])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.shape_model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    print(write_shape_model(arguments.name, arguments.folder, arguments.tiny))


if __name__ == "__main__":
    main()
