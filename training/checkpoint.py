"""Checkpoints of a training run: one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linocut.engine.errors import ConfigError

from .flat import FlatParameters

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


def save_checkpoint(folder: Path, flat: FlatParameters, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write master values, optimiser state and progress."""
    tensors: dict[str, Tensor] = {"master": flat.master.detach().cpu()}
    for group, parameter in flat.parameters.items():
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{group}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    metadata = {"progress": json.dumps(asdict(progress)), "layout": json.dumps(flat.layout)}
    part = folder / f"{FILE}.partial"
    save_file(tensors, part, metadata=metadata)
    part.replace(folder / FILE)


def load_checkpoint(folder: Path, flat: FlatParameters, optimizer: torch.optim.Optimizer) -> Progress | None:
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
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if layout != flat.layout:
        raise ConfigError(f"{path} is of another model, mode or rank: name another run folder")
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
