"""A golden folder: what it holds, and an engine for each setting that its cases need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from ..config import EngineConfig
from ..core import EngineCore
from ..errors import ModelError
from ..loading import load_model
from ..parallel.ranks import ALONE, Ranks

Outcome = Literal["pass", "known difference", "fail"]


@dataclass(frozen=True)
class Result:
    case: str
    outcome: Outcome
    detail: str = ""


class Fixture:
    """golden.json, golden.safetensors and the checkpoint of one folder. Raises ModelError if it is none."""

    def __init__(self, folder: Path, device: str = "cpu", checkpoint: str | None = None, ranks: Ranks = ALONE) -> None:
        """checkpoint: the model's folder as seen from `folder`; None: as golden.json says, or `folder` itself.

        ranks: each of them runs all cases, on its part of the model.
        """
        self.folder, self.device, self.ranks = folder, device, ranks
        try:
            self.meta: dict[str, Any] = json.loads((folder / "golden.json").read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} holds no readable golden.json: {error}") from None
        self.family = str(self.meta.get("family", folder.name))
        self.checkpoint = folder / (checkpoint or str(self.meta.get("checkpoint", ".")))
        self._engines: dict[tuple[Any, ...], EngineCore] = {}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = load_file(self.folder / "golden.safetensors")
        return loaded

    def cases(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.meta.get(kind, [])
        return found

    @property
    def case_count(self) -> int:
        return sum(len(value) for key, value in self.meta.items() if key.endswith("_cases"))

    def engine(
        self, block_size: int | None, stop_ids: tuple[int, ...], numerics: Literal["fast", "reference"]
    ) -> EngineCore:
        """An engine in float32; page 8 so that blocks of 4 share pages and blocks of 32 span several."""
        key = (block_size, stop_ids, numerics)
        if key not in self._engines:
            config = EngineConfig(
                model=str(self.checkpoint),
                dtype="float32",
                device=self.device,
                numerics=numerics,
                block_size=block_size,
                mask_id=self.meta.get("mask_token_id"),
                stop_ids=stop_ids,
                max_model_len=1024,
                max_running=8,
                page_size=8,
                # A canvas is run whole.
                token_budget=None if self.checkpoint.resolve().name in ("llada", "dream") else 512,
                kv_memory=16 << 20,
                check_invariants=True,
                tensor_parallel_size=self.ranks.size,
            )
            self._engines[key] = EngineCore(load_model(config, self.ranks), check_invariants=True)
        return self._engines[key]
