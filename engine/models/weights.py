"""Weights of a Hugging Face folder: safetensors, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from .adapter import FILE as ADAPTER_FILE
from .adapter import Part


class WeightFiles:
    """Tensors by name, read one at a time and handed to the device in the wanted dtype.

    files: names in the folder, where it holds the weights of more than one network; None: what the index or the folder
    lists.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, files: list[str] | None = None) -> None:
        self._dtype, self._device = dtype, device
        files = _listed(folder) if files is None else files
        if not files:
            raise ModelError(f"{folder} holds no .safetensors weights")
        self._where: dict[str, Path] = {}
        for name in files:
            path = folder / name
            try:
                with safe_open(path, framework="pt") as handle:
                    self._where.update(dict.fromkeys(handle.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path.name} cannot be read: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def get(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor:
        """One tensor, or a part of it. Raises ModelError if it is missing or, as a whole, not of `shape`."""
        path = self._where.get(name)
        if path is None:
            raise ModelError(f"the checkpoint lacks the tensor {name!r}")
        with safe_open(path, framework="pt") as handle:
            found = handle.get_slice(name)
            if tuple(found.get_shape()) != shape:
                raise ModelError(f"{name} has shape {tuple(found.get_shape())}, config.json implies {shape}")
            tensor: Tensor = found[part] if part else handle.get_tensor(name)
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ModelError(f"{name} is stored as {tensor.dtype}: quantised checkpoints are not supported")
        return tensor.to(device=self._device, dtype=self._dtype)


def _listed(folder: Path) -> list[str]:
    """The files of the folder's index, or all there are."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(p.name for p in folder.glob("*.safetensors"))
    names: dict[str, str] = json.loads(index.read_text())["weight_map"]
    # An adapter lies beside the base's weights, which its index does not know of.
    return sorted({*names.values(), *([ADAPTER_FILE] if (folder / ADAPTER_FILE).exists() else [])})


class RandomWeights:
    """Weights of a shape without a checkpoint, for benchmarks: small normal values, norms at one."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device=device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return True

    def get(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor:
        if name.endswith(("norm.weight", "ln_f.weight")):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        tensor.normal_(0.0, 0.02, generator=self._generator)
        # Drawn whole, so that all parts are of one model.
        return tensor[part].clone() if part else tensor
