"""The wheel: what is in it, and that it works away from the repository."""

from __future__ import annotations

import email
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, SOURCES, project, run, run_python


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_it_holds_the_package_and_its_metadata_only(names: list[str]) -> None:
    metadata = f"linocut-{project()['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"linocut", metadata}
    assert {name.split("/")[1] for name in names if name.startswith("linocut/")} == set(SOURCES)


def test_it_holds_every_module_of_the_source_folders(names: list[str]) -> None:
    modules = {f"linocut/{path.relative_to(ROOT)}" for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_it_holds_the_embedded_models_files_and_the_kernels_in_c_and_no_other_data(names: list[str]) -> None:
    folders = (ROOT / "engine" / "models" / "smollm2_135m", ROOT / "kernels" / "c")
    shipped = {f"linocut/{path.relative_to(ROOT)}" for folder in folders for path in folder.glob("*")}
    data = {name for name in names if name.startswith("linocut/") and not name.endswith((".py", "py.typed"))}
    assert data == shipped


def test_typed_packages_say_so(names: list[str]) -> None:
    typed = {f"linocut/{path.relative_to(ROOT)}" for folder in SOURCES for path in (ROOT / folder).rglob("py.typed")}
    assert {"linocut/engine/py.typed", "linocut/kernels/py.typed"} <= typed
    assert typed == {name for name in names if name.endswith("py.typed")}


def test_it_carries_its_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(path))
    assert metadata["License-Expression"] == "Apache-2.0"
    text = archive.read(path.replace("METADATA", "licenses/LICENSE")).decode()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_packages_named_for_the_build_are_the_folders_on_disk() -> None:
    found = {path.parent.relative_to(ROOT) for folder in SOURCES for path in (ROOT / folder).rglob("__init__.py")}
    assert set(project()["tool"]["setuptools"]["packages"]) == {".".join(["linocut", *path.parts]) for path in found}


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_command_runs(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "linocut"
    assert run([str(command), "--version"], tmp_path, installed).strip() == project()["project"]["version"]
    assert "--port" in run([str(command), "serve", "--help"], tmp_path, installed)


@pytest.mark.parametrize("module", ["linocut.engine.llm", "linocut.server.app", "linocut.kernels.attention"])
def test_it_is_imported_from_where_it_was_installed(module: str, installed: Path, tmp_path: Path) -> None:
    origin = run_python(f"import {module} as module; print(module.__file__)", tmp_path, installed)
    assert Path(origin.strip()).is_relative_to(installed)
