"""What the experts of a model look like, and how tokens are routed to them, as config.json says. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ModelError
from ..family import PUBLISHED_BLOCK_SIZE


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP of some layers.

    count, active: experts of a layer, and how many of them a token is sent to. intermediate: of one expert.
    shared_intermediate: of the experts that all tokens go through, side by side; 0 where there are none.
    score: what the router makes of its logits. expert_bias: "choice" is added to the scores for choosing only (LLaDA2),
        "weight" to the scores themselves (LLaDA-MoE). groups, active_groups: experts are chosen among those of the best
        groups. normalise: the weights of a token's experts sum to one; scale: and are multiplied by this.
    capacity: experts that the tokens of an aligned block of `block` positions share; each token chooses among them
        (LLaDA2.2). 0: a token chooses for itself.
    dense: layers with an ordinary MLP.
    """

    count: int
    active: int
    intermediate: int
    shared_intermediate: int = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    expert_bias: Literal["none", "choice", "weight"] = "none"
    groups: int = 1
    active_groups: int = 1
    normalise: bool = True
    scale: float = 1.0
    capacity: int = 0
    block: int = 1
    dense: frozenset[int] = frozenset()

    def at(self, layer: int) -> bool:
        return layer not in self.dense


def experts_from_config(kind: str, config: dict[str, Any]) -> Experts | None:
    """None for a backbone without experts. Raises ModelError for a router that is not known; KeyError, TypeError or
    ValueError for sizes that are missing or no numbers."""
    # transformers 5 writes `num_local_experts`.
    count = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    if not count:
        return None
    layers, active = int(config["num_hidden_layers"]), int(config["num_experts_per_tok"])
    intermediate = int(
        config.get("moe_intermediate_size") or config.get("expert_intermediate_size") or config["intermediate_size"]
    )
    if not 1 <= active <= count:
        raise ModelError(f"num_experts_per_tok {active} is not between 1 and num_experts {count}")
    shared = int(config.get("num_shared_experts") or 0) * int(
        config.get("moe_shared_expert_intermediate_size") or intermediate
    )
    if kind == "llada2":
        capacity = int(config.get("expert_capacity") or 0)
        groups, kept = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
        if capacity:
            # LLaDA2.2's config.json still names groups; its own code no longer looks at them.
            groups = kept = 1
        score = config.get("score_function", "sigmoid")
        if score not in ("sigmoid", "softmax"):
            raise ModelError(f"score_function {score!r} is not supported (sigmoid and softmax are)")
        if count % groups or not 1 <= kept <= groups or kept * (count // groups) < active or count // groups < 2:
            raise ModelError(
                f"n_group {groups} and topk_group {kept} do not fit {count} experts, {active} of them active"
            )
        if capacity and not active <= capacity <= count:
            raise ModelError(f"expert_capacity {capacity} is not between num_experts_per_tok {active} and {count}")
        return Experts(
            count,
            active,
            intermediate,
            shared,
            score=score,
            expert_bias="choice" if config.get("moe_router_enable_expert_bias", True) else "none",
            groups=groups,
            active_groups=kept,
            normalise=bool(config.get("norm_topk_prob", True)),
            scale=float(config.get("routed_scaling_factor", 1.0)),
            capacity=capacity,
            block=int(config.get("block_size") or PUBLISHED_BLOCK_SIZE["llada2"]) if capacity else 1,
            dense=frozenset(range(int(config.get("first_k_dense_replace") or 0))),
        )
    if kind == "olmoe":
        frequency = config.get("moe_layer_freq") or [1] * layers
        bias = config.get("moe_router_enable_expert_bias")
        return Experts(
            count,
            active,
            intermediate,
            int(config.get("shared_expert_intermediate_size") or 0),
            expert_bias="weight" if bias else "none",
            # Whatever norm_topk_prob says: the model's own code never normalises.
            normalise=False,
            dense=frozenset(index for index, sparse in enumerate(frequency) if not sparse),
        )
    step = int(config.get("decoder_sparse_step") or 1)
    dense = {int(index) for index in config.get("mlp_only_layers") or ()}
    dense |= {index for index in range(layers) if (index + 1) % step}
    return Experts(
        count,
        active,
        intermediate,
        shared,
        normalise=bool(config.get("norm_topk_prob", False)),
        dense=frozenset(dense),
    )
