"""A GGUF file of a tiny Llama, for tests of what reads it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from linocut.engine.models import gguf_import

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, VOCAB = 64, 2, 1, 96, 2, 40
HEAD_DIM = HIDDEN // HEADS
UNTRAINED = (16, 20, 33)
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def tiny_weights() -> dict[str, np.ndarray]:
    """A Llama's weights under Hugging Face's names, float32. [out, in]"""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), dtype=np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": matrix(1, HIDDEN)[0]}
    weights["model.embed_tokens.weight"][list(UNTRAINED)] = weights["model.embed_tokens.weight"][16]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights |= {
            f"{at}input_layernorm.weight": matrix(1, HIDDEN)[0],
            f"{at}self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{at}post_attention_layernorm.weight": matrix(1, HIDDEN)[0],
            f"{at}mlp.gate_proj.weight": matrix(FFN, HIDDEN),
            f"{at}mlp.up_proj.weight": matrix(FFN, HIDDEN),
            f"{at}mlp.down_proj.weight": matrix(HIDDEN, FFN),
        }
    return weights


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows, spelt out: row 2i of a head is Hugging Face's i, row 2i+1 its i + half."""
    size = weight.shape[0] // heads
    order = [head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return weight[order]


def write_gguf(path: Path, weights: dict[str, np.ndarray], architecture: str = "llama") -> None:
    """Matrices as Q8_0, except value projections and norms, which stay F32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(ord("a") + i) for i in range(VOCAB - len(specials) - 1)]
    writer.add_token_list([*specials, *letters, "ab"])
    writer.add_token_types([3] * len(specials) + [1] * (VOCAB - len(specials)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {hf: name for name, hf in gguf_import._TOP_NAMES.items()}
    for layer in range(LAYERS):
        names |= {f"model.layers.{layer}.{hf}": f"blk.{layer}.{name}" for name, hf in gguf_import._LAYER_NAMES.items()}
    for hf, weight in weights.items():
        if "q_proj" in hf or "k_proj" in hf:
            weight = interleave_halves(weight, HEADS if "q_proj" in hf else KV_HEADS)
        if weight.ndim == 1 or "v_proj" in hf:
            writer.add_tensor(names.get(hf, hf), weight)
        else:
            writer.add_tensor(names.get(hf, hf), gguf.quantize(weight, Q8_0), raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
