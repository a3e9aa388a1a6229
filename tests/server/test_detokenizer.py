from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import byte_level_bpe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from linocut.server.detokenizer import Detokenizer

TEXTS = [
    "Hello world!",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🦊🎉 ok",
    "a\u0301e\u0301 नमस्ते",
    "  spaces   and\n\nnewlines\t",
    "\ufffd real \ufffd\ufffd replacement",
]


class Decoder:
    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)


def byte_fallback() -> Tokenizer:
    """A SentencePiece-like tokenizer: ▁ for spaces, unknown characters as byte tokens."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ("▁", "a", "e", "l", "o", "H", "w", "r", "d", "▁world"):
        vocab[piece] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def stream(backend: Tokenizer, pieces: list[list[int]], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(Decoder(backend), skip)
    return [*map(detokenizer.push, pieces), detokenizer.flush()]


def cuts(ids: list[int], seed: int) -> list[list[int]]:
    rng, pieces, start = random.Random(seed), [], 0
    while start < len(ids):
        size = rng.choice((1, 1, 2, 3, 8))
        pieces.append(ids[start : start + size])
        start += size
    return pieces


@pytest.mark.parametrize("backend", [byte_level_bpe(), byte_fallback()], ids=["byte-level", "byte-fallback"])
@pytest.mark.parametrize("seed", range(5))
def test_deltas_add_up(backend, seed):
    for text in [*TEXTS, " ".join(TEXTS * 5)]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert "".join(stream(backend, cuts(ids, seed))) == backend.decode(ids)


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_no_delta_shows_a_broken_character(text):
    backend = byte_level_bpe()
    ids = backend.encode(text, add_special_tokens=False).ids
    assert not any("\ufffd" in delta for delta in stream(backend, [[token] for token in ids]))


def test_byte_fallback_in_pieces_that_end_inside_characters():
    backend = byte_fallback()
    ids = backend.encode("日本語" * 100).ids
    for size in (2, 4, 5, 7, 8, 64):
        assert "".join(stream(backend, [ids[i : i + size] for i in range(0, len(ids), size)])) == backend.decode(ids)


@given(st.lists(st.integers(0, byte_level_bpe().get_vocab_size() - 1), max_size=200), st.integers(0, 9))
@settings(max_examples=300)
def test_any_tokens_in_any_pieces(ids, seed):
    backend = byte_level_bpe()
    for skip in (True, False):
        deltas = stream(backend, cuts(ids, seed), skip)
        assert "".join(deltas) == backend.decode(ids, skip_special_tokens=skip)
        for delta in deltas:
            delta.encode("utf-8")


def test_control_tokens_on_request():
    backend = byte_level_bpe()
    ids = [0, *backend.encode("hi").ids, 1]
    assert "".join(stream(backend, [[token] for token in ids])) == "hi"
    assert "".join(stream(backend, [[token] for token in ids], skip=False)) == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize("text", ["a", "\u65e5", "invalid"])
def test_work_is_linear(text):
    """20,000 tokens one by one, the last case an endless run of invalid bytes."""
    backend = byte_level_bpe()
    ids = backend.encode(text).ids
    if text == "invalid":
        ids = [next(i for i in range(500) if backend.id_to_token(i) == "Ģ")]  # a lone continuation byte
    ids = ids * (20_000 // len(ids))
    began = time.monotonic()
    assert "".join(stream(backend, [[token] for token in ids])) == backend.decode(ids)
    assert time.monotonic() - began < 5
