"""What a decoder-only backbone looks like, read from a Hugging Face config.json. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..family import BACKBONE_OF_MODEL_TYPE


@dataclass(frozen=True)
class Backbone:
    """Shape and layer details of a Llama, Qwen2 or Qwen3 transformer.

    qkv_bias, o_bias, mlp_bias: linear layers with a bias. qk_norm: RMSNorm per head on queries and keys before RoPE.
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

    @property
    def parameters(self) -> int:
        """Weights that a forward reads, the embedding counted once (its rows are gathered, its head is read)."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = qkv + self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab * self.hidden

    def kv_bytes_per_position(self, itemsize: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def backbone_from_config(config: dict[str, Any]) -> Backbone:
    """Read a config.json. Raises ModelError for what is missing or not supported."""
    model_type = str(config.get("model_type", "")).lower()
    kind = BACKBONE_OF_MODEL_TYPE.get(model_type)
    if kind is None:
        raise ModelError(f"model_type {config.get('model_type')!r} is not supported")
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
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ModelError("partial rotary embeddings are not supported on this backbone")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        attention_bias = bool(config.get("attention_bias", False))
        return Backbone(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=None if rope_type == "default" else rope,
            tied_head=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or attention_bias,
            o_bias=kind != "qwen2" and attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            dtype=str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch."),
        )
    except KeyError as error:
        raise ModelError(f"config.json lacks {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json holds a size that is no number: {error}") from None
