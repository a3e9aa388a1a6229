"""The shipped adapter: reading its manifest, checking its files, and laying it over the base model's folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_delta import DOWN, LINOCUT, MASK, UP, stored_tensors, write_delta

from linocut.engine.errors import ModelError
from linocut.engine.models import delta, embedded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_delta(tmp_path / "delta", base="0123")


def manifest_of(folder: Path) -> delta.Manifest:
    manifest = delta.read_manifest(folder)
    assert manifest is not None
    return manifest


def test_a_folder_without_a_manifest_holds_no_delta(tmp_path: Path) -> None:
    assert delta.read_manifest(tmp_path) is None
    assert delta.read_manifest(tmp_path / "missing") is None


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    manifest = manifest_of(folder)
    assert manifest.base == "0123"
    assert list(manifest.files) == ["a.safetensors", "b.safetensors"]
    assert manifest.groups == {DOWN: (1, 2), UP: (3, 1), MASK: None}
    assert manifest.linocut == LINOCUT


def test_the_digest_covers_every_tensor(folder: Path, tmp_path: Path) -> None:
    same, other = write_delta(tmp_path / "same", "0123"), write_delta(tmp_path / "other", "0123", seed=1)
    assert manifest_of(same).digest == manifest_of(folder).digest != manifest_of(other).digest


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 1}', '{"format": 1, "tensors": {"a": {"group": 3}}, "files": {}}', "\xff"]
)
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "delta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"delta\.json of the embedded model is damaged"):
        delta.read_manifest(folder)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has format 2, this release reads 1"):
        delta.read_manifest(write_delta(tmp_path, "0123", format=2))


def test_each_value_is_multiplied_by_the_scale_of_its_group(folder: Path) -> None:
    found = delta.read_tensors(folder, manifest_of(folder))
    stored = stored_tensors()
    down, up = stored[DOWN].astype(np.float32), stored[UP].astype(np.float32)
    down[0] *= [0.5, 0.5, 1, 1, 2]
    down[1] *= [0.25, 0.25, 0.125, 0.125, 4]
    up[:3] *= [1, 2]
    up[3] *= [3, 4]
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys((DOWN, UP, MASK), np.float16)
    np.testing.assert_array_equal(found[DOWN], down)
    np.testing.assert_array_equal(found[UP], up)
    np.testing.assert_array_equal(found[MASK], stored[MASK])


def test_the_rounding_to_float16_is_far_below_that_to_int8() -> None:
    random = np.random.default_rng(0)
    values = random.integers(-127, 128, (64, 128), dtype=np.int8)
    scales = random.uniform(1e-5, 1e-3, (64, 2)).astype(np.float16)
    exact = values * np.repeat(scales.astype(np.float64), 64, axis=1)
    found = delta.dequantise(values, scales, (1, 64)).astype(np.float64)
    assert np.all(np.abs(found - exact) <= np.maximum(np.abs(exact) * 2**-11, 2**-25))


def test_progress_counts_files(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    delta.read_tensors(folder, manifest_of(folder), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("name", ["a.safetensors", "b.safetensors"])
def test_one_changed_byte_is_noticed(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ModelError, match=f"{name} of the embedded model has the sha256"):
        delta.read_tensors(folder, manifest_of(folder))


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors of the embedded model cannot be read"):
        delta.read_tensors(folder, manifest_of(folder))


@pytest.mark.parametrize(
    "tensors",
    [{DOWN: {"group": [1, 2]}, "model.draft_head.input": {}}, {MASK: {"group": [1, 64]}}, {DOWN: {"group": [1, 1]}}],
    ids=["no such tensor", "no scales", "another group"],
)
def test_files_that_do_not_fit_the_manifest_are_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    folder = write_delta(tmp_path, "0123", tensors=tensors)
    with pytest.raises(ModelError, match=r"do not fit its delta\.json"):
        delta.read_tensors(folder, manifest_of(folder))


@pytest.fixture
def original(tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    save_file({"model.norm.weight": np.ones(3, np.float16)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    config = {"model_type": "llama", "linocut": {"mask_token_id": 16, "banned_ids": [16, 20]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("links", [True, False])
def test_applying_it_gives_a_folder_to_serve(
    monkeypatch: pytest.MonkeyPatch, folder: Path, original: Path, tmp_path: Path, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    before = {path.name: path.read_bytes() for path in original.iterdir()}
    target = tmp_path / "target"
    target.mkdir()
    manifest = manifest_of(folder)
    delta.apply(folder, manifest, original, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    adapter, expected = load_file(target / "adapter.safetensors"), delta.read_tensors(folder, manifest)
    assert adapter.keys() == expected.keys()
    assert all(np.array_equal(adapter[name], expected[name]) for name in expected)
    config = json.loads((target / "config.json").read_text())
    assert config == {"model_type": "llama", "linocut": {"mask_token_id": 16, "banned_ids": [16, 20], **LINOCUT}}
    assert (target / "model.safetensors").samefile(original / "model.safetensors") is links
    assert {path.name: path.read_bytes() for path in original.iterdir()} == before


def test_what_goes_along_is_checked_and_counts_as_part_of_it(tmp_path: Path, original: Path) -> None:
    """A filter arrives as it was shipped or not at all; another one makes another digest, so another folder."""
    data = b"some filter"
    extras = {"filter.safetensors": {"sha256": hashlib.sha256(data).hexdigest()}}
    plain = manifest_of(write_delta(tmp_path / "plain", "a" * 64))
    folder = write_delta(tmp_path / "more", "a" * 64, extras=extras)
    (folder / "filter.safetensors").write_bytes(data)
    manifest = manifest_of(folder)
    assert manifest.digest != plain.digest
    target = tmp_path / "target"
    target.mkdir()
    delta.apply(folder, manifest, original, target)
    assert (target / "filter.safetensors").read_bytes() == data
    (folder / "filter.safetensors").write_bytes(b"another filter")
    (tmp_path / "second").mkdir()
    with pytest.raises(ModelError, match=r"filter\.safetensors .* sha256"):
        delta.apply(folder, manifest, original, tmp_path / "second")


def test_what_this_release_ships_is_whole_and_small_enough() -> None:
    manifest = delta.read_manifest(embedded.DELTA)
    if manifest is None:
        pytest.skip("this release ships no adapter")
    sizes = [(embedded.DELTA / name).stat().st_size for name in manifest.files]
    assert max(sizes) <= 16_000_000
    assert sum(path.stat().st_size for path in embedded.DELTA.iterdir()) <= 24_000_000
    assert manifest.base == embedded.PAYLOAD_SHA256
    assert (embedded.DELTA / "README.md").is_file()
    for name, sha256 in manifest.extras.items():
        assert hashlib.sha256((embedded.DELTA / name).read_bytes()).hexdigest() == sha256
    tensors = delta.read_tensors(embedded.DELTA, manifest)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
