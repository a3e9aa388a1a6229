"""What a decoder-only backbone looks like, read from a Hugging Face config.json. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..family import BACKBONE_OF_MODEL_TYPE, model_type_of
from .experts import Experts, experts_from_config
from .names import Layout

LAYOUTS: dict[str, Layout] = {"llada": "olmo", "llada2": "llada2", "ministral3": "encoder"}


@dataclass(frozen=True)
class Backbone:
    """Shape and layer details of a Llama, Qwen2, Qwen3 or Ministral 3 transformer, or of one with other names.

    qkv_bias, o_bias, mlp_bias: linear layers with a bias. qk_norm: RMSNorm per head on queries and keys before RoPE.
    names: how the checkpoint names its tensors (`names.py`). rotary_dim: leading dimensions of a head that rotate;
    None: all. rope_float32: queries and keys rotate in float32 whatever the model's dtype. query_scaling: (beta, n)
    multiplies a query at position p by 1 + beta * ln(1 + p // n), as Llama 4 does. experts: where layers have experts
    for an MLP.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str  # of the checkpoint, torch's name
    names: Layout = "llama"
    rotary_dim: int | None = None
    rope_float32: bool = False
    query_scaling: tuple[float, int] | None = None
    experts: Experts | None = None

    @property
    def parameters(self) -> int:
        """Weights that a forward of one token reads, the embedding counted once (its rows are gathered, its head is
        read): of a mixture of experts those that the token is routed to."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        attention = qkv + self.heads * self.head_dim * self.hidden
        mlp = 0
        for index in range(self.layers):
            width = self.intermediate
            if self.experts is not None and self.experts.at(index):
                width = self.experts.active * self.experts.intermediate + self.experts.shared_intermediate
            mlp += 3 * self.hidden * width
        return self.layers * attention + mlp + self.vocab * self.hidden

    def kv_bytes_per_position(self, itemsize: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def backbone_from_config(config: dict[str, Any]) -> Backbone:
    """Read a config.json. Raises ModelError for what is missing or not supported."""
    kind = BACKBONE_OF_MODEL_TYPE.get(model_type_of(config))
    if kind is None:
        raise ModelError(f"model_type {config.get('model_type')!r} is not supported")
    if kind == "llada":
        config = _from_olmo(config)
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {config['hidden_act']!r} is not supported (silu is)")
    sliding = config.get("use_sliding_window") and config.get("sliding_window")
    layer_types = set(config.get("layer_types") or ())
    if sliding or layer_types - {"full_attention"}:
        raise ModelError("sliding-window attention is not supported")
    # transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rope_float32 = bool(config.get("rope_full_precision", False))
    if config.get("clip_qkv") is not None:
        raise ModelError("clip_qkv is not supported")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        if heads % kv_heads:
            raise ModelError(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
        attention_bias = bool(config.get("attention_bias", config.get("use_qkv_bias", False)))
        partial = float(rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0)
        return Backbone(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=_dense_intermediate(kind, config),
            vocab=int(config["vocab_size"]),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=None if rope_type == "default" else rope,
            tied_head=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or attention_bias,
            o_bias=bool(config.get("use_bias", kind in ("llama", "qwen3", "olmoe") and attention_bias)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=_has_qk_norm(kind, config),
            dtype=str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch."),
            names=LAYOUTS.get(kind, "llama"),
            rotary_dim=None if partial == 1.0 else int(head_dim * partial),
            rope_float32=rope_float32,
            query_scaling=_query_scaling(kind, rope),
            experts=experts_from_config(kind, config),
        )
    except KeyError as error:
        raise ModelError(f"config.json lacks {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json holds a size that is no number: {error}") from None


def _dense_intermediate(kind: str, config: dict[str, Any]) -> int:
    """Width of the layers without experts; LLaDA-MoE has another name for it, and its checkpoints no such layer."""
    if kind != "olmoe":
        return int(config["intermediate_size"])
    return int(config["dense_intermediate_size"]) if 0 in (config.get("moe_layer_freq") or ()) else 0


def _query_scaling(kind: str, rope: dict[str, Any]) -> tuple[float, int] | None:
    if kind != "ministral3" or not rope.get("llama_4_scaling_beta"):
        return None
    return float(rope["llama_4_scaling_beta"]), int(rope["original_max_position_embeddings"])


def _has_qk_norm(kind: str, config: dict[str, Any]) -> bool:
    if kind == "llada2":
        return bool(config.get("use_qk_norm", True))
    if kind == "olmoe":
        return bool(config.get("qk_layernorm", False))
    if kind == "wedlm":
        # As its engine decides: a norm on queries and keys wherever they have no bias.
        return not config.get("attention_bias", False)
    return kind == "qwen3"


def _from_olmo(config: dict[str, Any]) -> dict[str, Any]:
    """LLaDA's config.json, which is in OLMo's words, in Llama's. Raises ModelError for what no checkpoint uses."""
    expected = {
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "alibi": False,
        "activation_type": "silu",
        "block_group_size": 1,
        "layer_norm_with_affine": True,
    }
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ModelError(f"{name} {config[name]!r} is not supported ({value} is)")
    unused = (
        "input_emb_norm",
        "attention_layer_norm",
        "scale_logits",
        "include_bias",
        "bias_for_layer_norm",
        "clip_qkv",
    )
    for name in unused:
        if config.get(name):
            raise ModelError(f"{name} is not supported")
    if config.get("multi_query_attention") and config.get("n_kv_heads") != 1:
        raise ModelError("multi_query_attention without n_kv_heads 1 is not supported")
    try:
        heads = config["n_heads"]
        return {
            "hidden_size": config["d_model"],
            "num_hidden_layers": config["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("n_kv_heads") or heads,
            "intermediate_size": config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
            "vocab_size": config.get("embedding_size") or config["vocab_size"],
            "max_position_embeddings": config.get("max_sequence_length", 4096),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
            "rope_theta": config.get("rope_theta", 10000.0),
            "rope_full_precision": config.get("rope_full_precision", True),
            "attention_bias": bool(config.get("include_qkv_bias")),
            "tie_word_embeddings": bool(config.get("weight_tying")),
            "torch_dtype": config.get("torch_dtype", "bfloat16"),
        }
    except KeyError as error:
        raise ModelError(f"config.json lacks {error.args[0]!r}") from None
