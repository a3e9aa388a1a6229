"""Putting a gated conversion of the embedded model into the package: its adapter in int8, in files a repository takes.

Reading it back, and what the files hold, is `linocut.engine.models.delta`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from safetensors.torch import load_file

from linocut.engine.decoding.filter import FILE as FILTER
from linocut.engine.decoding.filter import read_filter
from linocut.engine.errors import ModelError
from linocut.engine.models import delta, embedded

MAX_FILE_BYTES = 16_000_000
MAX_BYTES = 24_000_000
# Values that share a scale; scales then add 3 % to the size. On random matrices of an adapter's shapes, rank 32 to 128
# (uniform, normal, Student's t with four degrees of freedom, rows or columns of log-normal size), the relative error is
# 0.4 to 0.9 %; with one scale per row or per column, whichever is better, 0.4 to 1.1 %.
GROUP = 64
_HEADER_SPARE = 1 << 17  # room for the safetensors header of a file

Array = NDArray[Any]


@dataclass(frozen=True)
class Shipment:
    """What was written: bytes by file name, and by quantised tensor the error's norm over the tensor's."""

    files: dict[str, int]
    errors: dict[str, float]


def ship(converted: Path, out: Path | None = None) -> Shipment:
    """Write the adapter of `converted`, a gated conversion of the embedded model, to `out` as the delta to ship.

    Adapter matrices become int8, everything else float16. `out` is the package's own folder unless given; an older
    delta in it is replaced, and the model card README.md copied where `converted` has one. Where `converted` holds base
    weights they have to be the embedded model's. A filter (strategy `learned`) belongs to the adapter that it was
    trained for: an older one is removed, one in `converted` taken along. Raises ModelError if it is no such conversion,
    or if it is too large to ship.
    """
    out = embedded.DELTA if out is None else out
    linocut = _read_traits(converted)
    tensors = _read_adapter(converted)
    _check_base(converted)
    stored: dict[str, Array] = {}
    listed: dict[str, dict[str, Any]] = {}
    errors: dict[str, float] = {}
    for name, weight in sorted(tensors.items()):
        listed[name] = {"shape": list(weight.shape), "dtype": "float16"}
        if ".adapter." not in name:
            stored[name] = _to_float16(name, weight)
            continue
        values, scales, group = quantise(weight)
        stored[name], stored[name + delta.SCALE] = values, scales
        listed[name] |= {"dtype": "int8", "group": list(group)}
        errors[name] = relative_error(weight, delta.dequantise(values, scales, group))

    parts = list(_split(stored))
    total = sum(array.nbytes for array in stored.values())
    if total + len(parts) * _HEADER_SPARE > MAX_BYTES:
        raise ModelError(f"the adapter takes {total / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: use a lower rank")
    out.mkdir(parents=True, exist_ok=True)
    for old in [out / delta.MANIFEST, out / FILTER, *out.glob("delta-*.safetensors")]:
        old.unlink(missing_ok=True)
    files: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(parts, start=1):
        data = save(part)
        name = f"delta-{number:05}-of-{len(parts):05}.safetensors"
        (out / name).write_bytes(data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest = {
        "format": delta.FORMAT,
        "base": {"package": embedded.REQUIREMENT, "sha256": embedded.PAYLOAD_SHA256},
        "linocut": linocut,
        "files": files,
        "tensors": listed,
    }
    if (converted / "README.md").is_file():
        shutil.copyfile(converted / "README.md", out / "README.md")
    (out / delta.MANIFEST).write_text(_render(manifest), encoding="utf-8")  # last: without it there is no delta
    if (converted / FILTER).is_file():
        ship_filter(converted / FILTER, out)
    return Shipment({name: int(file["bytes"]) for name, file in files.items()}, errors)


def ship_filter(path: Path, out: Path | None = None) -> None:
    """Put a filter, trained for the delta in `out`, beside it and into its manifest. Raises ModelError."""
    out = embedded.DELTA if out is None else out
    if delta.read_manifest(out) is None:
        raise ModelError(f"{out} holds no delta that a filter could belong to")
    read_filter(path.parent, torch.device("cpu"))
    data = path.read_bytes()
    (out / FILTER).write_bytes(data)
    manifest = json.loads((out / delta.MANIFEST).read_text(encoding="utf-8"))
    extras = manifest.get("extras", {}) | {FILTER: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    (out / delta.MANIFEST).write_text(_render(manifest | {"extras": extras}), encoding="utf-8")


def quantise(weight: Array) -> tuple[NDArray[np.int8], NDArray[np.float16], tuple[int, int]]:
    """int8 values, float16 scales and the (rows, columns) that share one: along the rows or the columns, as errs less.

    weight: [rows, columns] float32. Symmetric, nearest value; see `delta.dequantise` for the way back.
    """
    best: tuple[NDArray[np.int8], NDArray[np.float16], tuple[int, int]] | None = None
    least = np.inf
    for group in ((1, GROUP), (GROUP, 1)):
        values, scales = _quantise_groups(weight, group)
        error = relative_error(weight, delta.dequantise(values, scales, group))
        if error < least:
            best, least = (values, scales, group), error
    if best is None:
        raise ModelError("the adapter holds values that are not finite, or beyond float16")
    return best


def _quantise_groups(weight: Array, group: tuple[int, int]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    rows, columns = weight.shape
    down, across = -(-rows // group[0]), -(-columns // group[1])  # groups
    padded = np.pad(np.abs(weight), ((0, down * group[0] - rows), (0, across * group[1] - columns)))
    peaks = padded.reshape(down, group[0], across, group[1]).max(axis=(1, 3))  # [groups down, groups across]
    exact = (peaks / 127).astype(np.float32)
    with np.errstate(over="ignore"):  # quantise refuses infinite scales: their error is no number
        scales = exact.astype(np.float16)
        # Upwards, so that the largest value of a group still fits into 127 steps.
        scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales).astype(np.float16)
    steps = np.repeat(np.repeat(scales.astype(np.float32), group[0], 0)[:rows], group[1], 1)[:, :columns]
    values = np.rint(weight / np.where(steps == 0, np.float32(1), steps))
    with np.errstate(invalid="ignore"):
        return np.clip(values, -127, 127).astype(np.int8), scales


def relative_error(weight: Array, restored: Array) -> float:
    """The norm of the difference over the norm of `weight`, 0 for a matrix of zeros."""
    norm = float(np.linalg.norm(weight))
    return float(np.linalg.norm(restored.astype(np.float32) - weight)) / norm if norm else 0.0


def _read_traits(converted: Path) -> dict[str, Any]:
    """The `linocut` object of config.json, which has to name a gated adapter."""
    try:
        config = json.loads((converted / "config.json").read_text(encoding="utf-8"))
        linocut = dict(config["linocut"])
        gate = linocut["adapter"]["gate"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"config.json in {converted} names no adapter to ship: {error!r}") from error
    if gate != "noisy":
        raise ModelError(f"an adapter with the gate {gate!r} cannot be shipped: only 'noisy' leaves the base as it is")
    return linocut


def _read_adapter(converted: Path) -> dict[str, Array]:
    """adapter.safetensors in float32."""
    path = converted / delta.ADAPTER
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    arrays = {name: np.ascontiguousarray(tensor.float().numpy()) for name, tensor in tensors.items()}
    if wrong := [name for name, array in arrays.items() if ".adapter." in name and array.ndim != 2]:
        raise ModelError(f"{wrong[0]} in {path} is not a matrix")
    return arrays


def _check_base(converted: Path) -> None:
    """Raise ModelError if `converted` holds base weights that differ from the embedded model's beyond bfloat16."""
    shards = sorted(converted.glob("model*.safetensors"))
    if not shards:  # the adapter came alone
        return
    original = embedded.ensure(adapted=False) / "model.safetensors"
    with safe_open(original, framework="pt") as base:
        missing = set(base.keys())
        for shard in shards:
            with safe_open(shard, framework="pt") as own:
                for name in own.keys():  # noqa: SIM118, no mapping
                    if name == "lm_head.weight" and name not in missing:  # tied, written twice
                        continue
                    if name not in missing or not _same(own.get_tensor(name), base.get_tensor(name)):
                        raise ModelError(f"{name} in {shard.name} is not the embedded model's: the base was changed")
                    missing.remove(name)
    if missing:
        raise ModelError(f"{converted} lacks {len(missing)} tensors of the embedded model, {min(missing)} for one")


def _same(own: torch.Tensor, base: torch.Tensor) -> bool:
    return own.shape == base.shape and torch.equal(own.to(torch.bfloat16), base.to(torch.bfloat16))


def _to_float16(name: str, weight: Array) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half: NDArray[np.float16] = weight.astype(np.float16)
    if not np.isfinite(half).all():
        raise ModelError(f"{name} holds values that are not finite, or beyond float16")
    return half


def _split(stored: dict[str, Array]) -> Iterator[dict[str, Array]]:
    """Parts of at most MAX_FILE_BYTES, in order."""
    part: dict[str, Array] = {}
    size = 0
    for name, array in stored.items():
        if array.nbytes > MAX_FILE_BYTES - _HEADER_SPARE:
            raise ModelError(f"{name} alone is larger than a file may be")
        if size + array.nbytes > MAX_FILE_BYTES - _HEADER_SPARE:
            yield part
            part, size = {}, 0
        part[name] = array
        size += array.nbytes
    yield part


def _render(manifest: dict[str, Any]) -> str:
    """JSON with one line for each tensor, so that a reader, and git, can follow it."""
    tensors = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest["tensors"].items())
    rest = json.dumps({key: value for key, value in manifest.items() if key != "tensors"}, indent=2)
    return f'{rest[: rest.rindex("}")].rstrip()},\n  "tensors": {{\n{tensors}\n  }}\n}}\n'
