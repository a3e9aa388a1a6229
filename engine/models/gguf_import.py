"""Reading a Llama checkpoint out of a GGUF file: configuration, and dense weights under Hugging Face's names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

Array: TypeAlias = NDArray[Any]

# Tensors outside the layers, and those of layer N (GGUF `blk.N.*`, Hugging Face `model.layers.N.*`).
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_SAFETENSORS_DTYPE = {"float16": "F16", "float32": "F32"}


def open_gguf(path: Path) -> GGUFReader:
    """Map a GGUF file into memory. Raises ModelError where the file, or the package that reads it, is unusable."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("reading a GGUF file needs the package gguf: pip install 'linocut[embedded]'") from error
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{path.name} is not a readable GGUF file: {error}") from error
    if (architecture := read_field(reader, "general.architecture")) != "llama":
        raise ModelError(f"{path.name} holds a model of architecture {architecture!r}; only 'llama' can be imported")
    return reader


def read_field(reader: GGUFReader, key: str) -> Any:
    """The value of a metadata field as plain Python. Raises ModelError where the file lacks it."""
    field = reader.get_field(key)
    if field is None:
        raise ModelError(f"the GGUF file lacks the field {key}")
    return field.contents()


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """The file's hyper-parameters as a Hugging Face Llama config.json, without token ids and dtype."""

    def integer(key: str) -> int:
        return int(read_field(reader, f"llama.{key}"))

    def real(key: str) -> float:
        # GGUF keeps float32: the shortest decimal that reads back to it is what its authors wrote (1e-05).
        return float(str(np.float32(read_field(reader, f"llama.{key}"))))

    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise ModelError("the GGUF file lacks the tensor token_embd.weight")
    theta = real("rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon"),
        # Both spellings: transformers 5 reads rope_parameters, everything older the flat key.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def unpermute_rope(weight: Array, heads: int) -> Array:
    """Bring the rows of a q or k projection from GGUF's order back to Hugging Face's. [heads * head_dim, in], same out.

    llama.cpp rotates neighbours (2i, 2i+1), Hugging Face rotates halves (i, i + head_dim/2), so its converter
    interleaves the halves of every head. Works on quantised rows too: blocks run along a row.
    """
    rows, width = weight.shape
    # [heads, head_dim/2, 2, width] -> [heads, 2, head_dim/2, width]
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def name_weights(reader: GGUFReader) -> dict[str, ReaderTensor]:
    """The file's tensors by their Hugging Face names, in the file's order. ModelError for one a Llama does not have."""
    # rope_freqs is llama.cpp's precomputed table, which follows from the configuration.
    return {_huggingface_name(t.name): t for t in reader.tensors if t.name != "rope_freqs.weight"}


def _huggingface_name(name: str) -> str:
    if (top := _TOP_NAMES.get(name)) is not None:
        return top
    prefix, _, rest = name.partition(".")
    layer, _, suffix = rest.partition(".")
    if prefix != "blk" or not layer.isdigit() or suffix not in _LAYER_NAMES:
        raise ModelError(f"tensor {name} does not belong to a Llama model")
    return f"model.layers.{layer}.{_LAYER_NAMES[suffix]}"


def read_weight(name: str, tensor: ReaderTensor, config: dict[str, Any]) -> Array:
    """The float32 values of `tensor` as the Hugging Face weight `name`, [out, in] or [out].

    Raises ModelError for a quantisation that gguf cannot undo.
    """
    from gguf import dequantize

    data = tensor.data
    if name.endswith("self_attn.q_proj.weight"):
        data = unpermute_rope(data, int(config["num_attention_heads"]))
    elif name.endswith("self_attn.k_proj.weight"):
        data = unpermute_rope(data, int(config["num_key_value_heads"]))
    try:
        values: Array = dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelError(f"tensor {tensor.name} is quantised as {tensor.tensor_type.name}: {error}") from error
    return values


def write_safetensors(
    reader: GGUFReader,
    config: dict[str, Any],
    path: Path,
    dtype: Literal["float16", "float32"],
    advance: Callable[[int, int], None] | None = None,
) -> None:
    """Write every weight of `reader` to `path` as `dtype`, calling `advance(done, total)` after each tensor.

    The file is laid out here rather than by the safetensors package because that one wants all tensors in memory at
    once; this holds one at a time.
    """
    weights = name_weights(reader)
    target = np.dtype(dtype).newbyteorder("<")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in weights.items():
        end = offset + int(tensor.n_elements) * target.itemsize
        shape = [int(n) for n in reversed(tensor.shape)]  # GGUF counts dimensions from the innermost
        header[name] = {"dtype": _SAFETENSORS_DTYPE[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, (name, tensor) in enumerate(weights.items(), start=1):
            file.write(np.ascontiguousarray(read_weight(name, tensor, config), dtype=target).data)
            if advance is not None:
                advance(done, len(weights))
        file.flush()
        os.fsync(file.fileno())
