"""FlashAttention as a second implementation of staircase attention, for the forwards whose staircase it knows.

FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608) reads paged keys of any page size on Hopper, but it has two masks
only: none, and causal from the lower right corner. A forward that the host knows to be of one of these shapes
(`AttentionLayout.pattern`) can go there. The generations, and why it is this one: docs/kernels.md.

Its kernel is one operator, `fwd`, whose builds differ in a few arguments: `flash_attn_3` is its authors' own (module
`flash_attn_interface`), `_vllm_fa3_C` the one in vLLM's wheel. Arguments are given by the names in the schema.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attention import AttentionLayout

# What `fwd` is told wherever it asks; None for everything else.
_ALWAYS: dict[str, Any] = {
    "window_size_left": -1,
    "window_size_right": -1,
    "attention_chunk": 0,
    "softcap": 0.0,
    "is_rotary_interleaved": True,
    "num_splits": 0,  # as many as its heuristic likes
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


class FlashUnavailableError(RuntimeError):
    """There is no FlashAttention here that can serve."""


class FlashAttention:
    """operator: a build's `fwd`, an overload of a torch operator. everything: take all that the masks allow, also
    where the Triton kernel measured faster."""

    def __init__(self, operator: Any, *, everything: bool = False) -> None:
        self.name = str(operator._schema.name).split("::")[0]
        self.everything = everything
        self._operator: Callable[..., Any] = operator
        self._names = [argument.name for argument in operator._schema.arguments]

    def takes(self, layout: AttentionLayout, tokens: int, k_cache: Tensor) -> bool:
        """Whether a forward of so many queries goes here rather than to the Triton kernel."""
        if layout.pattern == "any" or tokens == 0 or k_cache.dtype not in (torch.bfloat16, torch.float16):
            return False
        return self.everything or is_faster(layout, k_cache.shape[3])

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        """`attention.staircase_attention`, for layouts whose pattern is known."""
        used, seen = _lengths(layout)
        # Queries that see nothing are not computed: their places keep the zeros.
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        given = _ALWAYS | {
            "q": q,
            "k": k_cache,
            "v": v_cache,
            "out": out,
            "cu_seqlens_q": layout.query_start,
            "seqused_q": used,
            "seqused_k": seen,
            "max_seqlen_q": layout.max_query,
            "max_seqlen_k": layout.max_visible,
            "page_table": layout.page_table,
            "softmax_scale": scale,
            "is_causal": layout.pattern == "causal",
        }
        self._operator(*(given.get(name) for name in self._names))
        return out


def is_faster(layout: AttentionLayout, head_dim: int) -> bool:
    """Where it measured faster than the Triton kernel on an H200, from what the host knows (docs/kernels.md).

    Wide rows are bound by arithmetic, which it overlaps with its softmax; few narrow ones on long contexts by how their
    keys are dealt out. Smaller heads, and narrow rows on short contexts, gain nothing.
    """
    return head_dim >= 128 and (layout.max_query >= 32 or layout.max_visible > 2048)


def _lengths(layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    """[rows] int32 each: queries of a row that see something, and slots that its last one of them sees."""
    if "flash" not in layout.plans:
        live = layout.visible > 0
        before = torch.nn.functional.pad(live.cumsum(0, dtype=torch.int32), (1, 0))
        used = before[layout.query_start.long()].diff()
        last = (layout.query_start[:-1] + (used - 1).clamp(min=0)).clamp(max=layout.visible.shape[0] - 1)
        seen = torch.where(used > 0, layout.visible[last.long()], 0).int()
        layout.plans["flash"] = used, seen
    used, seen = layout.plans["flash"]
    return used, seen


def find_flash(device: torch.device) -> Any:
    """The `fwd` of a build that is installed. Raises FlashUnavailableError, which says what was looked for."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise FlashUnavailableError("FlashAttention-3 needs a Hopper GPU")
    reasons = []
    for found in (_authors_build, _vllm_build):
        try:
            return found()
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            reasons.append(f"{type(error).__name__}: {str(error)[:200]}")
    raise FlashUnavailableError(f"no FlashAttention-3 is installed ({'; '.join(reasons)})")


def _authors_build() -> Any:
    importlib.import_module("flash_attn_interface")
    return torch.ops.flash_attn_3.fwd.default


def _vllm_build() -> Any:
    # Not imported: that would start vLLM's own set-up.
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("vLLM is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "vllm_flash_attn"
    torch.ops.load_library(str(folder / "_vllm_fa3_C.abi3.so"))
    return torch.ops._vllm_fa3_C.fwd.default
