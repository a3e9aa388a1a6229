"""Where a model comes from: local folders and hub ids, without any network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from linocut.engine.errors import ModelError
from linocut.engine.models import embedded
from linocut.engine.models.source import resolve_model


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_text("{}", encoding="utf-8")
    return path


def raise_(error: Exception) -> Any:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    return snapshot_download


def test_none_is_the_embedded_model_and_so_is_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "ensure", lambda adapted=True: tmp_path if adapted else None)
    assert resolve_model(None) == tmp_path
    assert resolve_model("smollm2-135m-linocut") == tmp_path


def test_the_original_of_the_embedded_model_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedded, "ensure", lambda adapted: tmp_path if not adapted else None)
    assert resolve_model("smollm2-135m-instruct") == tmp_path
    folder_with(tmp_path / "smollm2-135m-instruct", "config.json", "model.safetensors")
    assert resolve_model("smollm2-135m-instruct") == Path("smollm2-135m-instruct")


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", "config.json", "model.safetensors", "pytorch_model.bin", "q4.gguf")
    assert resolve_model(str(folder)) == folder


def test_a_local_folder_without_weights_passes_for_random_ones(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", "config.json")
    assert resolve_model(str(folder)) == folder


def test_a_local_folder_is_taken_before_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_(AssertionError("asked the hub")))
    folder_with(tmp_path / "org" / "name", "config.json", "model.safetensors")
    assert resolve_model("org/name") == Path("org/name")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ((), "has no config.json"),
        (("model.safetensors",), "has no config.json"),
        (("model.gguf",), "holds GGUF weights only"),
        (("config.json", "model.gguf"), "holds GGUF weights only"),
        (("config.json", "pytorch_model.bin"), "holds PyTorch pickle weights only"),
        (("config.json", "pytorch_model.bin", "m.gguf"), "holds GGUF and PyTorch pickle weights only"),
        (("config.json", "model.safetensors", "model.safetensors.index.json"), "has a damaged model.safetensors.index"),
    ],
)
def test_an_unservable_folder_is_refused(tmp_path: Path, files: tuple[str, ...], sentence: str) -> None:
    folder = folder_with(tmp_path / "m", *files)
    with pytest.raises(ModelError, match=sentence):
        resolve_model(str(folder))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", "config.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing \(b\.safetensors\)"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    "name", ["", "gpt2", "./missing", "/no/such/folder", "a/b/c", "../x", "~/nothing-here", "a b/c"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_asking_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_(AssertionError("asked the hub")))
    with pytest.raises(ModelError):
        resolve_model(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file: name the folder"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_a_hub_id_fetches_data_and_never_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    folder = folder_with(tmp_path / "snapshot", "config.json", "model.safetensors")

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name") == folder
    assert asked["name"] == "org/name"

    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    unwanted = ["modeling_x.py", "pytorch_model.bin", "x.gguf", "onnx/config.json", "consolidated.safetensors"]
    fetched = huggingface_hub.utils.filter_repo_objects(
        wanted + unwanted, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(fetched) == wanted


def test_a_hub_id_without_safetensors_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "snapshot", "config.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(ModelError, match=r"no \*\.safetensors on the hub"):
        resolve_model("org/name")


RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.GatedRepoError("403 Client Error", response=RESPONSE), "org/name is gated: accept its terms"),
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "org/name does not exist on the hub"),
        (errors.LocalEntryNotFoundError("no"), r"not \(wholly\) in the local cache and the hub cannot be reached"),
        (errors.HfHubHTTPError("500 Server Error\nrequest id 1", response=RESPONSE), "from the hub: 500 Server Error$"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "from the hub: RuntimeError$"),
    ],
)
def test_every_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_(error))
    with pytest.raises(ModelError, match=sentence) as raised:
        resolve_model("org/name")
    assert "\n" not in str(raised.value)


class TestOffline:
    """The real huggingface_hub, forbidden to use the network."""

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        return tmp_path

    def test_what_is_not_cached_is_refused(self) -> None:
        with pytest.raises(ModelError, match=r"not \(wholly\) in the local cache and HF_HUB_OFFLINE is set"):
            resolve_model("org/name")

    def test_what_is_cached_is_used(self, cache: Path) -> None:
        repository = cache / "models--org--name"
        snapshot = folder_with(repository / "snapshots" / ("0" * 40), "config.json", "model.safetensors")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        assert resolve_model("org/name") == snapshot
