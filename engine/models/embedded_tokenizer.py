"""SmolLM2's tokenizer, rebuilt from the tokens and merges of its GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .gguf_import import read_field

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL = 3  # GGUF's token type of tokens that text never produces


def build_tokenizer(reader: GGUFReader) -> Tokenizer:
    """The byte-level BPE of `reader`, as its authors' own tokenizer.json has it.

    Digits are split one by one before the byte-level step (GGUF only says `pre: smollm`; transformers' own importer
    loses this). Twenty-one bytes that no assigned character needs have no token; their characters vanish, as upstream.
    """
    tokens: list[str] = read_field(reader, "tokenizer.ggml.tokens")
    types: list[int] = read_field(reader, "tokenizer.ggml.token_type")
    merges: list[str] = read_field(reader, "tokenizer.ggml.merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as AutoTokenizer reads them, to `folder`."""
    tokenizer = build_tokenizer(reader)
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(role: str) -> str:
        text = tokenizer.id_to_token(int(read_field(reader, f"tokenizer.ggml.{role}_token_id")))
        assert text is not None  # the reader's vocabulary and ids come from one file, pinned by hash
        return text

    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it stands; GPT2Tokenizer would rebuild it and lose the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(read_field(reader, "llama.context_length")),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    template: str = read_field(reader, "tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
