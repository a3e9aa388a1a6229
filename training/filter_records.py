"""What a filter learns from: confidences of blocks, and which proposals are those of a reference text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linocut.engine.core import EngineCore
from linocut.engine.decoding.filter import Filter
from linocut.engine.decoding.strategies.learned import Learned, filter_input
from linocut.engine.decoding.strategy import Equipment
from linocut.engine.decoding.view import Decision, RowView, WindowStatistics
from linocut.engine.errors import ConfigError
from linocut.engine.family import FamilyTraits
from linocut.engine.flight import Flight
from linocut.engine.llm import LLM
from linocut.engine.plan import StepPlan

UNKNOWN = -1


@dataclass
class Records:
    """Blocks as forwards saw them.

    confidence: [N, W] float32, what the filter sees. counts: [N, W] bool, undecided positions whose reference is known,
    but for those that a clean row decides. right: [N, W] bool, those of them whose proposal is the reference's token.
    prompt: [N] int64, its index.
    """

    confidence: Tensor
    right: Tensor
    counts: Tensor
    prompt: Tensor


@dataclass
class Oracle(Learned):
    """Extremely greedy decoding towards a known text (Learn2PD, section 3): all proposals that are the reference's are
    committed, and where none is, the surest position takes its reference token. Notes every step.

    references: [slots, positions] ids by absolute position; prompts: [slots], the index of the prompt in a slot.
    """

    references: Tensor
    prompts: Tensor
    noted: list[Records] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        reference = self.references[view.slots[:, None], view.places.long()]
        masks = statistics.candidates & view.masked
        right = masks & (statistics.token == reference)
        # Where a clean row has spoken there is nothing to judge.
        counts = masks & (reference != UNKNOWN) & ~statistics.confidence.isinf()
        learns = counts.any(dim=1) & view.whole
        confidence = filter_input(statistics)
        kept = (values[learns] for values in (confidence, right & counts, counts, self.prompts[view.slots]))
        self.noted.append(Records(*kept))
        # `guard` commits the surest one where none is right, with the token given here.
        return Decision(right, torch.where(reference == UNKNOWN, statistics.token, reference))


def collect(llm: LLM, prompts: Sequence[list[int]], texts: Sequence[list[int]]) -> Records:
    """Decode the reference `texts` behind `prompts` (token ids, all different) as fast as an oracle could.

    Only block decoding is noted: forwards that decide the first position of a block by themselves have nothing to
    choose. Raises ConfigError if the model decodes no blocks.
    """
    core = llm.core
    if not isinstance(core, EngineCore):
        raise ConfigError("no filter can be trained for this model: it decodes no blocks")
    size = max(core.traits.block_size, 1)
    # What it says is not asked for; it has to be there for the strategy to be offered.
    core.equip(Equipment(_blank(size)))
    info = next(info for info in core.info.strategy_table if info.name == Learned.name)
    if info.refusal:
        raise ConfigError(f"no filter can be trained for this model: {info.refusal}")
    tokens = core.runner.state.tokens
    oracle = Oracle(torch.full_like(tokens, UNKNOWN, dtype=torch.int64), torch.zeros_like(tokens[:, 0]).long())
    learned = core.runner.strategies[Learned.name]
    core.runner.strategies[Learned.name] = oracle
    index = {tuple(prompt): number for number, prompt in enumerate(prompts)}
    launch = core.launch

    def launch_prepared(plan: StepPlan) -> Flight | None:
        for row in plan.admissions:
            number = index[tuple(row.tokens[: row.prompt_len])]
            text = torch.tensor(texts[number], dtype=torch.int64)
            oracle.references[row.slot] = UNKNOWN
            oracle.references[row.slot, row.prompt_len : row.prompt_len + len(text)] = text.to(tokens.device)
            oracle.prompts[row.slot] = number
        return launch(plan)

    core.launch = launch_prepared  # type: ignore[method-assign]
    try:
        longest = max(len(text) for text in texts)
        options: dict[str, Any] = {"temperature": 0.0, "diffusion": {"strategy": Learned.name}}
        answers = llm.generate([list(prompt) for prompt in prompts], max_tokens=longest, **options)
    finally:
        core.launch = launch  # type: ignore[method-assign]
        core.runner.strategies[Learned.name] = learned
    for (answer,), text in zip(answers, texts, strict=True):
        assert answer.token_ids == text, "the oracle writes the reference"
    return joined(oracle.noted)


def joined(parts: Sequence[Records]) -> Records:
    """All records, on the CPU, blocks padded to the widest."""
    width = max((part.confidence.shape[1] for part in parts), default=0)

    def wide(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values.cpu(), (0, width - values.shape[1]))

    return Records(
        torch.cat([wide(part.confidence) for part in parts]),
        torch.cat([wide(part.right) for part in parts]),
        torch.cat([wide(part.counts) for part in parts]),
        torch.cat([part.prompt.cpu() for part in parts]),
    )


def _blank(size: int) -> Filter:
    zeros = torch.zeros(size, size)
    return Filter(zeros, zeros[0], zeros, zeros[0])
