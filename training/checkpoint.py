"""Checkpoints of a training run: one safetensors file, replaced as a whole."""

from __future__ import annotations

import hashlib
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

from .documents import Documents
from .export import find_mask_id
from .flat import FlatParameters
from .settings import AdaptSettings

FILE = "checkpoint.safetensors"
# Options that may change before a run goes on: they say when it ends, what it tells, where and how it computes, and
# what the converted folder says of itself. The others decide what is learnt.
_FREE = {
    *("base", "data", "init_adapter"),  # paths: `identity` tells what lies there
    *("run", "output", "layout", "block_size", "banned_ids"),
    *("max_seconds", "max_steps", "max_tokens", "session_seconds"),
    *("checkpoint_seconds", "evaluate_seconds", "log_every", "peak_tflops"),
    *("device", "dtype", "compile", "head_chunk"),
}


@dataclass
class Progress:
    """Where a run stands. All randomness is a function of the seed and the step, so no generator state is kept."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False


def identity(settings: AdaptSettings, documents: Documents, processes: int) -> dict[str, Any]:
    """What a run learns, and of what: with any of it changed a checkpoint would be another run's, in the same shapes.

    documents: all of the run's data, as loaded. Files are told by what they hold, so that they may move.
    """
    s, base = settings, Path(settings.base).resolve()
    config, _ = read_config(base)
    kept = {name: value for name, value in asdict(s).items() if name not in _FREE}
    if s.mode == "full":
        del kept["rank"], kept["scale"]
    return {
        "base": base.name,
        "bytes of weights": sum(path.stat().st_size for path in base.glob("model*.safetensors")),
        **kept,
        "mask_token_id": find_mask_id(s, config),
        "init_adapter": _beginning(s),
        "data": f"of {len(documents.tokens)} tokens",
        "processes": processes,
    }


def _beginning(settings: AdaptSettings) -> str | None:
    """What init_adapter holds, or its name where the run itself writes over it."""
    if settings.init_adapter is None:
        return None
    path = Path(settings.init_adapter).resolve()
    if path.parent in (Path(settings.run).resolve(), Path(settings.output).resolve()):
        return path.name
    with path.open("rb") as file:
        return f"of sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What of `wanted` was stored otherwise. Checkpoints of earlier versions tell less."""
    free = {"processes"}
    if stored.get("processes") != wanted["processes"]:
        free.add("accumulate")  # makes up for another number of processes
    names = [name for name in wanted if name in stored and name not in free and stored[name] != wanted[name]]
    return [f"{name} {stored[name]} (not {wanted[name]})" for name in names]


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
    if differing := _differences(stored, conversion):
        told = ", ".join(differing)
        raise ConfigError(f"{path} is of a run with {told}: go on with the same settings, or name another run folder")
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
            # Moments have the parameter's dtype, which another compute dtype may widen; the count of steps its own.
            optimizer.state[parameter] = {
                name: value.to(home, value.dtype if name == "step" else parameter.dtype)
                for name, value in found.items()
            }
    flat.publish()
    return progress
