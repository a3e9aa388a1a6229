"""How checkpoints name their tensors, told in the names that Llama's checkpoints use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from .adapter import Part, WeightsInParts
    from .backbone import Backbone

Layout = Literal["llama", "olmo", "llada2", "encoder"]

_OLMO_TOP = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
_OLMO_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_LLADA2_LAYER = {
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
}


class NamedWeights:
    """Tensors of a checkpoint under Llama's names.

    LLaDA names them as OLMo does. LLaDA2 keeps queries, keys and values in one tensor, in this order. Nemotron-Labs'
    models call the transformer an encoder and what reads it a diffusion head.
    """

    def __init__(self, weights: WeightsInParts, backbone: Backbone) -> None:
        self._weights, self._backbone = weights, backbone

    def __contains__(self, name: str) -> bool:
        found, _ = self._find(name)
        return found in self._weights

    def get(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor:
        """One tensor of `shape`, or a part of it. Raises ModelError if it is missing or of another shape."""
        found, nth = self._find(name)
        if nth is None:
            return self._weights.get(found, shape, part)
        b = self._backbone
        sizes = [b.heads * b.head_dim, b.kv_heads * b.head_dim, b.kv_heads * b.head_dim]
        if sizes[nth] != shape[0]:
            raise ModelError(f"{found} holds {sizes[nth]} rows for {name}, config.json implies {shape[0]}")
        first, end, _ = (part[0] if part else slice(None)).indices(shape[0])
        rows = slice(sum(sizes[:nth]) + first, sum(sizes[:nth]) + end)
        return self._weights.get(found, (sum(sizes), *shape[1:]), (rows, *part[1:]))

    def _find(self, name: str) -> tuple[str, int | None]:
        """The checkpoint's name, and which part of that tensor is meant: 0 queries, 1 keys, 2 values, None all."""
        layout = self._backbone.names
        if layout == "llama":
            return name, None
        if layout == "encoder":
            if name == "lm_head.weight":
                return "diffusion_head.weight", None
            return name.replace("model.", "encoder.", 1), None
        if layout == "olmo" and name in _OLMO_TOP:
            return _OLMO_TOP[name], None
        if layout == "llada2" and name == "model.embed_tokens.weight":
            return "model.word_embeddings.weight", None
        if not name.startswith("model.layers."):
            return name, None
        _, _, index, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        if layout == "olmo":
            return f"model.transformer.blocks.{index}.{_OLMO_LAYER.get(module, module)}.{kind}", None
        part = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}.get(module)
        if part is not None:
            return f"model.layers.{index}.attention.query_key_value.{kind}", part
        return f"model.layers.{index}.{_LLADA2_LAYER.get(module, module)}.{kind}", None
