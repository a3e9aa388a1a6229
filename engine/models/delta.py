"""The shipped difference between a plain base model and the one Linocut serves: an adapter in int8, beside a manifest.

A delta is a folder: `delta.json` (the manifest), the safetensors files that it lists, and whatever else goes with the
model, such as its card. `linocut.training.ship` writes it, this reads it back, without torch.

A quantised matrix is stored as int8 values [rows, columns] under its own name and float16 scales under the name with
`.scale`. One scale covers a group of neighbours along a row or a column, whichever suits the matrix better.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError

MANIFEST = "delta.json"
ADAPTER = "adapter.safetensors"
FORMAT = 1
SCALE = ".scale"


@dataclass(frozen=True)
class Manifest:
    """What a delta folder holds.

    digest: sha256 of the manifest itself, which covers the files through their own. base: sha256 of the base model's
    payload. files: sha256 by name. groups: by tensor, the (rows, columns) that share a scale; None where it is stored
    in float16. linocut: the object of that name for config.json. extras: sha256 by name of what goes into the model's
    folder as it is, such as the filter of the strategy `learned`.
    """

    digest: str
    base: str
    files: dict[str, str]
    groups: dict[str, tuple[int, int] | None]
    linocut: dict[str, Any]
    extras: dict[str, str] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`, or None if it holds no delta. Raises ModelError for one that cannot be read."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{MANIFEST} of the embedded model cannot be read: {error.strerror}") from error
    try:
        content = json.loads(data)
        if (found := content["format"]) != FORMAT:
            raise ModelError(f"{MANIFEST} of the embedded model has format {found}, this release reads {FORMAT}")
        groups: dict[str, tuple[int, int] | None] = {}
        for name, tensor in content["tensors"].items():
            rows, columns = tensor.get("group") or (0, 0)
            groups[name] = (int(rows), int(columns)) if rows else None
        files = {str(name): str(file["sha256"]) for name, file in content["files"].items()}
        extras = {str(name): str(file["sha256"]) for name, file in content.get("extras", {}).items()}
        base, linocut = str(content["base"]["sha256"]), dict(content["linocut"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{MANIFEST} of the embedded model is damaged: {error!r}") from error
    return Manifest(hashlib.sha256(data).hexdigest(), base, files, groups, linocut, extras)


def read_tensors(
    folder: Path, manifest: Manifest, advance: Callable[[int, int], None] | None = None
) -> dict[str, NDArray[np.float16]]:
    """The delta's tensors in float16, by name, calling `advance(done, total)` after each file.

    Every file's sha256 is checked before anything of it is used. Raises ModelError where one is missing, is not the one
    that was shipped, or lacks a tensor of the manifest.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    stored: dict[str, NDArray[Any]] = {}
    for done, (name, sha256) in enumerate(manifest.files.items(), start=1):
        data = _read_checked(folder / name, sha256)
        try:
            stored |= load(data)
        except SafetensorError as error:
            raise ModelError(f"{name} of the embedded model is not a safetensors file: {error}") from error
        if advance is not None:
            advance(done, len(manifest.files))
    try:
        return {name: _restore(name, stored, group) for name, group in manifest.groups.items()}
    except (KeyError, ValueError) as error:
        raise ModelError(f"the embedded model's files do not fit its {MANIFEST}: {error}") from error


def _read_checked(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path.name} of the embedded model cannot be read: {error.strerror}") from error
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ModelError(f"{path.name} of the embedded model has the sha256 {found}, not {sha256} as shipped")
    return data


def _restore(name: str, stored: Mapping[str, NDArray[Any]], group: tuple[int, int] | None) -> NDArray[np.float16]:
    if group is None:
        return stored[name].astype(np.float16)
    return dequantise(stored[name], stored[name + SCALE], group)


def dequantise(values: NDArray[np.int8], scales: NDArray[np.float16], group: tuple[int, int]) -> NDArray[np.float16]:
    """values * scales, rounded once to float16, which adds at most 2**-11 of a value to the error of int8.

    values: [rows, columns]; scales: [ceil(rows / group rows), ceil(columns / group columns)]. Returns [rows, columns].
    """
    rows, columns = values.shape
    per_row = np.repeat(scales.astype(np.float32), group[0], axis=0)[:rows]
    per_value = np.repeat(per_row, group[1], axis=1)[:, :columns]  # [rows, columns]
    result: NDArray[np.float16] = (values * per_value).astype(np.float16)
    return result


def companions(folder: Path, manifest: Manifest) -> list[Path]:
    """What goes with the model into the converted folder unchecked: its card, and pictures in it."""
    own = {MANIFEST, *manifest.files, *manifest.extras}
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in own]


def apply(
    folder: Path,
    manifest: Manifest,
    original: Path,
    target: Path,
    advance: Callable[[int, int], None] | None = None,
) -> None:
    """Fill the empty folder `target` with the model `original` plus the delta in `folder`, ready to be served.

    `original` is a Hugging Face folder of the base. Its large files are shared by hard link where the file system can,
    so both take hardly more space than one. Raises ModelError as `read_tensors` does.
    """
    from safetensors.numpy import save

    tensors = read_tensors(folder, manifest, advance)
    for path in sorted(original.iterdir()):
        if path.suffix == ".safetensors":
            _link(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
    with (target / ADAPTER).open("wb") as file:
        file.write(save(tensors, metadata={"format": "pt"}))
        file.flush()
        os.fsync(file.fileno())
    config_path = target / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["linocut"] = {**config.get("linocut", {}), **manifest.linocut}
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, sha256 in manifest.extras.items():
        (target / name).write_bytes(_read_checked(folder / name, sha256))
    for path in companions(folder, manifest):
        shutil.copyfile(path, target / path.name)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, target)
