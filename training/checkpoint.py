"""Checkpoints of a training run: one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linocut.engine.errors import ConfigError
from linocut.engine.loading import read_config

from .export import find_mask_id
from .flat import FlatParameters
from .settings import AdaptSettings

FILE = "checkpoint.safetensors"


@dataclass
class Progress:
    """Where a run stands. All randomness is a function of the seed and the step, so no generator state is kept."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False


def identity(settings: AdaptSettings) -> dict[str, Any]:
    """What the values of a run mean: with any of it changed they would be another model's, in the same shapes."""
    s, base = settings, Path(settings.base).resolve()
    config, _ = read_config(base)
    found = {
        "base": base.name,
        "bytes of weights": sum(path.stat().st_size for path in base.glob("model*.safetensors")),
        "mode": s.mode,
        "context": s.context,
        "logit_source": s.logit_source,
        "mask_token_id": find_mask_id(s, config),
        "draft_head": s.draft_head,
        "seed": s.seed,
    }
    return found if s.mode == "full" else found | {"rank": s.rank, "scale": s.scale}


def save_checkpoint(
    folder: Path,
    flat: FlatParameters,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    conversion: dict[str, Any],
) -> None:
    """Write master values, optimiser state, progress and the `identity` of the conversion."""
    tensors: dict[str, Tensor] = {"master": flat.master.detach().cpu()}
    for group, parameter in flat.parameters.items():
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{group}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    told = {"progress": asdict(progress), "layout": flat.layout, "conversion": conversion}
    metadata = {name: json.dumps(value) for name, value in told.items()}
    part = folder / f"{FILE}.partial"
    save_file(tensors, part, metadata=metadata)
    part.replace(folder / FILE)


def load_checkpoint(
    folder: Path, flat: FlatParameters, optimizer: torch.optim.Optimizer, conversion: dict[str, Any]
) -> Progress | None:
    """Restore what `save_checkpoint` wrote; None without a checkpoint. Raises ConfigError if it does not fit."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(**json.loads(metadata["progress"]))
        layout = json.loads(metadata["layout"])
        stored = json.loads(metadata.get("conversion", "{}"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if not stored:
        raise ConfigError(f"{path} does not say which conversion it is of: name another run folder")
    differing = [name for name in conversion if name in stored and stored[name] != conversion[name]]
    if differing:
        told = ", ".join(f"{name} {stored[name]} (not {conversion[name]})" for name in differing)
        raise ConfigError(f"{path} is of another conversion, with {told}: name another run folder")
    if layout != flat.layout:
        raise ConfigError(f"{path} is of a model of another shape: name another run folder")
    with torch.no_grad():
        flat.master.copy_(tensors["master"])
    for group, parameter in flat.parameters.items():
        prefix = f"optimizer.{group}."
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        # A fused optimiser counts its steps on the device, another on the host.
        home = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
        if found:
            optimizer.state[parameter] = {name: value.to(home) for name, value in found.items()}
    flat.publish()
    return progress
