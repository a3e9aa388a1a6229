"""docs/strategies.md: every strategy, its parameters and where it is valid, written from the code."""

from __future__ import annotations

from typing import Any

from ..family import FamilyTraits, family_from_config
from .description import ParameterInfo, StrategyInfo
from .registry import offered

# A config.json of each family, as far as its traits go.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Llama, Qwen2, Qwen3": {"model_type": "qwen3"},
    "Fast-dLLM v2": {"model_type": "fast_dllm_qwen"},
    "SDAR, TraDo": {"model_type": "sdar"},
    "LLaDA2": {"model_type": "llada2_moe"},
    "LLaDA2.2": {
        "model_type": "llada2_moe",
        "expert_capacity": 48,
        "delete_token_id": 156930,
        "split_token_id": 156931,
    },
    "Stable-DiffCoder": {"model_type": "llama", "architectures": ["StableDiffCoder"], "mask_token_id": 5},
    "LLaDA, LLaDA-MoE": {"model_type": "llada"},
    "Dream": {"model_type": "dream"},
    "WeDLM": {"model_type": "wedlm"},
    "Nemotron-Labs-Diffusion": {"model_type": "nemotron_labs_diffusion"},
    "`linocut convert`": {
        "model_type": "llama",
        "linocut": {"context": "token-causal", "logit_source": "previous", "block_size": 4, "mask_token_id": 5},
    },
}


def families() -> dict[str, FamilyTraits]:
    """Traits of each family under its name in the tables; those that may hold a filter do."""
    found = {}
    for name, config in _CONFIGS.items():
        traits = family_from_config({"vocab_size": 200_000, **config})
        found[name] = FamilyTraits(**{**vars(traits), "has_filter": traits.mask_id is not None})
    canvas = FamilyTraits("canvas", "canvas", "own", 1024, 1024, 5, (), reward=True)
    return {**found, "MDLM, DiDi-Instruct": canvas}


def strategy_tables() -> str:
    """The page as Markdown."""
    offers = {name: offered(traits).strategy_table for name, traits in families().items()}
    names = sorted({info.name for table in offers.values() for info in table})
    lines = [
        "# Decoding strategies",
        "",
        "Written by `linocut strategies`; do not edit.",
        "",
        '`extra_body={"diffusion": {"strategy": NAME, PARAMETER: VALUE, …}}` chooses one for a request,',
        "`--strategy NAME --strategy-parameter PARAMETER=VALUE` for all that name none. What is not valid on a",
        "model is a 400 that says why. Default of a family: **bold**.",
        "",
        "| strategy | " + " | ".join(offers) + " |",
        "|---" * (len(offers) + 1) + "|",
    ]
    for name in names:
        cells = []
        for table in offers.values():
            info = next(info for info in table if info.name == name)
            cells.append("" if info.refusal else ("**yes**" if table[0].name == name else "yes"))
        lines.append(f"| [{name}](#{name}) | " + " | ".join(cells) + " |")
    for name in names:
        lines += ["", *_section([next(info for info in table if info.name == name) for table in offers.values()])]
    return "\n".join(lines) + "\n"


def _section(infos: list[StrategyInfo]) -> list[str]:
    valid = [info for info in infos if not info.refusal]
    summary, *more = valid[0].summary.split("\n\n")
    lines = [
        f"## {valid[0].name}",
        "",
        " ".join(summary.split()),
        *_paragraphs(more),
        "",
        f"Source: {valid[0].source}.",
    ]
    parameters: dict[str, list[ParameterInfo]] = {}
    for info in valid:
        for parameter in info.parameters:
            parameters.setdefault(parameter.name, []).append(parameter)
    if parameters:
        lines += ["", "| parameter | values | default | |", "|---|---|---|---|"]
        lines += [_row(name, found) for name, found in parameters.items()]
    return lines


def _paragraphs(texts: list[str]) -> list[str]:
    return [line for text in texts for line in ("", " ".join(text.split()))]


def _row(name: str, found: list[ParameterInfo]) -> str:
    """Bounds and defaults that differ between families are told by their range, or left to the family."""
    first = found[0]
    defaults = {parameter.default for parameter in found}
    default = "by family" if len(defaults) > 1 else "" if first.default is None else _value(first.default)
    return f"| `{name}` | {_values(found)} | {default} | {first.description} |"


def _values(found: list[ParameterInfo]) -> str:
    first = found[0]
    if first.kind == "boolean":
        return "true, false"
    if first.kind == "choice":
        return ", ".join(map(str, first.choices))
    if any(parameter.choices for parameter in found):
        return "divisors of the block"
    number = "integer" if first.kind == "integer" else "number"
    most = [parameter.maximum for parameter in found if parameter.maximum is not None]
    upper = f" to {max(most):g}" if most else " or more"
    return f"{number}, {first.minimum:g}{upper}" if first.minimum is not None else number


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
