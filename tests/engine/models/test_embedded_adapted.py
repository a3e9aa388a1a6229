"""The package holds an adapter: the embedded model that is served is the original with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_delta import LINOCUT, write_delta
from tiny_gguf import UNTRAINED
from tiny_package import ensure, forbid_downloads

from linocut.engine.errors import ModelError
from linocut.engine.models import embedded

pytestmark = pytest.mark.usefixtures("tiny_package")


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch, tiny_package: Path, tmp_path: Path) -> Path:
    folder = write_delta(tmp_path / "delta", embedded.PAYLOAD_SHA256)
    monkeypatch.setattr(embedded, "DELTA", folder)
    return folder


def test_the_first_start_makes_both_models_and_shares_the_weights(tmp_path: Path) -> None:
    folder = ensure(tmp_path / "cache")
    original = embedded.ensure(tmp_path / "cache", progress=False, adapted=False)
    assert folder != original
    names = {path.name for path in original.iterdir()} | {"adapter.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "model.safetensors").samefile(original / "model.safetensors")
    assert embedded.is_complete(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["linocut"] == {"mask_token_id": 16, "banned_ids": list(UNTRAINED), **LINOCUT}
    assert "context" not in json.loads((original / "config.json").read_text())["linocut"]
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {folder.name, original.name, f"{folder.name}.lock", f"{original.name}.lock"}


def test_later_starts_need_neither_the_network_nor_the_original(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = ensure(tmp_path)
    shutil.rmtree(embedded.ensure(tmp_path, progress=False, adapted=False))
    forbid_downloads(monkeypatch)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("wrote to the cache"))
    assert ensure(tmp_path) == folder


def test_an_upgrade_makes_another_folder_without_a_download(
    monkeypatch: pytest.MonkeyPatch, shipped: Path, tmp_path: Path
) -> None:
    before = ensure(tmp_path / "cache")
    adapter = (before / "adapter.safetensors").read_bytes()
    forbid_downloads(monkeypatch)
    write_delta(shipped, embedded.PAYLOAD_SHA256, seed=1)
    after = ensure(tmp_path / "cache")
    assert after != before
    assert (after / "adapter.safetensors").read_bytes() != adapter == (before / "adapter.safetensors").read_bytes()


def test_weights_cut_short_are_made_again_in_both(tmp_path: Path) -> None:
    folder = ensure(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    os.truncate(folder / "model.safetensors", 1000)
    assert ensure(tmp_path) == folder
    original = embedded.ensure(tmp_path, progress=False, adapted=False)
    assert weights == (folder / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()


def test_a_changed_file_of_the_package_is_refused(shipped: Path, tmp_path: Path) -> None:
    with (shipped / "b.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match=r"b\.safetensors of the embedded model has the sha256"):
        ensure(tmp_path / "cache")
    (made,) = [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert made == embedded.ensure(tmp_path / "cache", progress=False, adapted=False)


def test_an_adapter_of_another_base_is_refused(monkeypatch: pytest.MonkeyPatch, shipped: Path, tmp_path: Path) -> None:
    write_delta(shipped, base="0123")
    forbid_downloads(monkeypatch)
    with pytest.raises(ModelError, match="was made for the payload 0123"):
        ensure(tmp_path / "cache")
