"""docs/metrics.md: every metric, written from the code."""

from __future__ import annotations

from .metric_specs import SECTIONS, Spec

_HEAD = """# Metrics

Written by `linocut metrics`; do not edit.

`/metrics` serves these in Prometheus' text format, all with the label `model_name`. Names and meanings are vLLM's, with
the prefix `linocut_` for `vllm:`, where both measure the same. Servers are told apart by the labels that Prometheus
adds (`instance`), the engines of one (`--replicas`) by `engine`, counted from 0; counters of several add up. A
histogram has `_bucket`, `_sum` and `_count`.

Counts are made per step, chunk and request, from the report that a step sends to the host anyway. Branches of
`freedave` count as its rule's commits, not as drafts; segments that ran in part (`candidates` of `jacobi`) as whole
ones. Strategies that decode from a frontier (`autoregressive`, `jacobi`, `verify`, `reorder`) know no blocks: they take
no part in `linocut_blocks_finished_total` and the histograms of blocks. [deploy/](../deploy/README.md) has dashboards
and alerts.
"""


def metric_table() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for section, specs in SECTIONS.items():
        lines += [f"## {section}", "", "| metric | kind | labels | |", "|---|---|---|---|", *map(_row, specs), ""]
    return "\n".join(lines)


def _row(spec: Spec) -> str:
    labels = "; ".join(f"`{name}`: {values}" if values else f"`{name}`" for name, values in spec.labels.items())
    return f"| `{spec.family}` | {spec.kind} | {labels} | {spec.text} |"
