"""What importing a part of the project brings along, and what it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkout import ROOT, run_python

# The scheduler, the caches and what the server takes from the engine.
TORCH_FREE = [
    "linocut.engine.canvas.parameters",
    "linocut.engine.canvas.schedule",
    "linocut.engine.canvas.shape",
    "linocut.engine.config",
    "linocut.engine.decoding.parameters",
    "linocut.engine.errors",
    "linocut.engine.messages",
    "linocut.engine.models.delta",
    "linocut.engine.models.embedded",
    "linocut.engine.models.source",
    "linocut.engine.params",
    "linocut.engine.plan",
    "linocut.engine.scheduler",
    "linocut.engine.sequence",
    "linocut.engine.validation",
    *(f"linocut.engine.cache.{path.stem}" for path in sorted((ROOT / "engine/cache").glob("[!_]*.py"))),
]


def modules_after(imports: list[str], folder: Path, installed: Path) -> set[str]:
    code = "import importlib, json, sys\n"
    code += f"for name in {imports!r}: importlib.import_module(name)\n"
    code += "print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(run_python(code, folder, installed)))


@pytest.mark.parametrize("module", TORCH_FREE)
def test_plain_parts_of_the_engine_load_without_torch(module: str, tmp_path: Path, installed: Path) -> None:
    loaded = modules_after([module], tmp_path, installed)
    assert module in loaded
    assert "torch" not in loaded


def test_the_server_loads_without_torch(tmp_path: Path, installed: Path) -> None:
    modules = sorted(path.stem for path in (ROOT / "server").glob("*.py") if path.stem != "__init__")
    assert {"app", "cli", "engine_client", "tokenizer"} <= set(modules)
    loaded = modules_after([f"linocut.server.{module}" for module in modules], tmp_path, installed)
    assert loaded.isdisjoint({"ray", "torch", "transformers", "triton"})


def test_transformers_works_from_the_root_of_the_repository(tmp_path: Path) -> None:
    """It probes for a package named `kernels`; there it finds our folder, which must not disturb it."""
    code = f"""
import importlib.util, sys
assert sys.path[0] in ("", {str(ROOT)!r})
assert importlib.util.find_spec("kernels").origin == {str(ROOT / "kernels" / "__init__.py")!r}
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)
LlamaForCausalLM(config).save_pretrained({str(tmp_path)!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(list(model(torch.tensor([[1, 2, 3]])).logits.shape))
"""
    assert run_python(code, ROOT).splitlines()[-1] == "[1, 3, 32]"
