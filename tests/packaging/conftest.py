from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from checkout import copy_tree, project, run
from packaging.requirements import Requirement


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_tree(folder / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder)]
    if build_requirements_are_here():
        command.append("--no-isolation")
    run(command, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def build_requirements_are_here() -> bool:
    requirements = map(Requirement, project()["build-system"]["requires"])
    try:
        return all(requirement.specifier.contains(version(requirement.name)) for requirement in requirements)
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path that holds the installed wheel and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    run([*pip, "--target", str(folder), str(wheel)], folder)
    return folder
