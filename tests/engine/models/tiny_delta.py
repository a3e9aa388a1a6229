"""A delta written by hand, for tests of what reads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DOWN, UP = "model.layers.0.self_attn.o_proj.adapter.down", "model.layers.0.self_attn.o_proj.adapter.up"
MASK = "model.mask_embedding"
LINOCUT = {"context": "token-causal", "block_size": 8, "adapter": {"rank": 2, "gate": "noisy"}}


def stored_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """`down` with a scale per two values of a row, `up` with one per three values of a column."""
    random = np.random.default_rng(seed)
    return {
        DOWN: random.integers(-127, 128, (2, 5), dtype=np.int8),
        f"{DOWN}.scale": np.array([[0.5, 1, 2], [0.25, 0.125, 4]], np.float16),
        UP: random.integers(-127, 128, (4, 2), dtype=np.int8),
        f"{UP}.scale": np.array([[1, 2], [3, 4]], np.float16),
        MASK: random.standard_normal(3).astype(np.float16),
    }


def write_delta(folder: Path, base: str, seed: int = 0, **changes: Any) -> Path:
    """A delta in two files for the payload of sha256 `base`; `changes` replace entries of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = stored_tensors(seed)
    files = {}
    for name, part in {"a.safetensors": {UP, f"{UP}.scale"}, "b.safetensors": {DOWN, f"{DOWN}.scale", MASK}}.items():
        save_file({key: value for key, value in stored.items() if key in part}, folder / name)
        files[name] = {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
    manifest = {
        "format": 1,
        "base": {"sha256": base},
        "linocut": LINOCUT,
        "files": files,
        "tensors": {DOWN: {"group": [1, 2]}, UP: {"group": [3, 1]}, MASK: {}},
    }
    (folder / "delta.json").write_text(json.dumps(manifest | changes), encoding="utf-8")
    (folder / "README.md").write_text("# The card", encoding="utf-8")
    return folder
