"""The repository that the tests run in, and Python processes that see it in one way or another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("server", "engine", "kernels", "training")


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def copy_tree(target: Path) -> None:
    """What a checkout holds, without what was built or installed in it."""

    def unwanted(folder: str, names: list[str]) -> set[str]:
        built = {"build", "dist", "__pycache__"} | {name for name in names if name.endswith(".egg-info")}
        environments = {name for name in names if (Path(folder) / name / "pyvenv.cfg").is_file()}
        return built | environments | {".git"} | {name for name in names if name.endswith("_cache")}

    shutil.copytree(ROOT, target, ignore=unwanted)


def run(command: list[str], folder: Path, path: Path | None = None) -> str:
    """Standard output of a command run in `folder`, with `path` in front of what Python sees; fails if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_python(code: str, folder: Path, path: Path | None = None) -> str:
    """`run` of a Python program. Its sys.path starts with `folder`, as with `python -c`."""
    return run([sys.executable, "-c", code], folder, path)
