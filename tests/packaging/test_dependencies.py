"""What the project declares, what it imports, and the versions it was tested with."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
from checkout import ROOT, SOURCES, project
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# pip installs the others.
UNPINNED = {"pip"}
EXTRAS = tuple(project()["project"]["optional-dependencies"])


def core() -> list[Requirement]:
    return [Requirement(line) for line in project()["project"]["dependencies"]]


def declared() -> list[Requirement]:
    extras = project()["project"]["optional-dependencies"]
    return core() + [Requirement(line) for lines in extras.values() for line in lines]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned: dict[str, str] = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert canonicalize_name(requirement.name) not in pinned
        pinned[canonicalize_name(requirement.name)] = specifier.version
    return pinned


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_a_declared_dependency_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name in UNPINNED:
        assert name not in pins()
    else:
        assert requirement.specifier.contains(pins()[name])


def test_what_the_dependencies_depend_on_is_pinned_too() -> None:
    """PyTorch's own apart: builds with CUDA name a dozen packages, and their versions."""
    reached: set[str] = set()
    waiting = [("linocut", ("", *EXTRAS))]
    while waiting:
        name, extras = waiting.pop()
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # of an extra that is not installed
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            child = canonicalize_name(requirement.name)
            if (marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)) and child not in reached:
                reached.add(child)
                if child != "torch":
                    waiting.append((child, ("", *requirement.extras)))
    assert {"starlette", "httpcore", "pluggy"} <= reached
    assert reached - UNPINNED - pins().keys() == set()


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """Distributions whose modules the sources import, wherever in a file."""
    distributions = packages_distributions()
    return {canonicalize_name(distributions.get(package, [package])[0]) for package in imported_packages()}


def imported_packages() -> set[str]:
    """Top-level names that the sources import from neither Python's library nor this project."""
    names: set[str] = set()
    for path in (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"linocut"}


def test_every_import_is_declared(imported: set[str]) -> None:
    assert "torch" in imported
    assert imported - {canonicalize_name(requirement.name) for requirement in declared()} == set()


def test_every_core_dependency_is_imported(imported: set[str]) -> None:
    assert {canonicalize_name(requirement.name) for requirement in core()} - imported == set()
