"""Shipping an adapter: what quantisation loses, what is written, and that the package serves it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from linocut.engine.errors import ModelError
from linocut.engine.models import delta, embedded
from linocut.engine.models.linear import fits_float16
from linocut.training import ship as shipping
from linocut.training.ship import quantise, relative_error, ship, ship_filter

HIDDEN, RANK = 96, 20
LINOCUT = {"context": "token-causal", "block_size": 8, "adapter": {"rank": RANK, "gate": "noisy"}}
Matrix = Callable[[np.random.Generator, int, int], np.ndarray]


def uniform(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """`down` as it is initialised."""
    return random.uniform(-1, 1, (rows, columns)) / np.sqrt(columns)


def normal(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return random.standard_normal((rows, columns)) * 3e-3


def heavy_tailed(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return random.standard_t(4, (rows, columns)) * 3e-3


def uneven_rows(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return random.standard_normal((rows, columns)) * np.exp(1.5 * random.standard_normal((rows, 1))) * 1e-3


def uneven_columns(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return uneven_rows(random, columns, rows).T


def restore(weight: np.ndarray) -> np.ndarray:
    return delta.dequantise(*quantise(weight))


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (20, 100), (1, 1)])
@pytest.mark.parametrize("matrix", [uniform, normal, heavy_tailed, uneven_rows, uneven_columns])
def test_int8_loses_about_a_hundredth(matrix: Matrix, shape: tuple[int, int]) -> None:
    weight = matrix(np.random.default_rng(0), *shape).astype(np.float32)
    found = restore(weight)
    assert found.dtype == np.float16
    assert found.shape == shape
    assert relative_error(weight, found) < 0.012


def test_the_layout_follows_the_matrix() -> None:
    random = np.random.default_rng(0)
    rows, columns = (matrix(random, 256, 256).astype(np.float32) for matrix in (uneven_rows, uneven_columns))
    assert quantise(rows)[2] == (1, 64)
    assert quantise(columns)[2] == (64, 1)


def test_the_largest_value_of_a_group_is_not_clipped() -> None:
    """A scale rounded down to float16 would leave the peak above 127 steps."""
    peaks = np.random.default_rng(0).uniform(1e-6, 1e-2, (1000, 1)).astype(np.float32)
    values, scales, group = quantise(peaks)
    assert np.all(values <= 127)
    assert np.all(np.abs(delta.dequantise(values, scales, group) - peaks) <= np.repeat(scales, group[0], 0)[:1000])


def test_zeros_stay_zeros() -> None:
    np.testing.assert_array_equal(restore(np.zeros((70, 3), np.float32)), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_beyond_float16_are_refused(value: float) -> None:
    weight = np.ones((2, 2), np.float32)
    weight[0, 0] = value
    with pytest.raises(ModelError, match="not finite"):
        quantise(weight)


# ---------------------------------------------------------------------------------------------------------------------


def adapter(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    tensors = {"model.mask_embedding": random(HIDDEN), "draft_head.input": random(HIDDEN, 2 * HIDDEN)}
    for layer in range(2):
        for name, rows in (("self_attn.qkv_proj", 160), ("mlp.gate_up_proj", 512)):
            tensors[f"model.layers.{layer}.{name}.adapter.down"] = random(RANK, HIDDEN)
            tensors[f"model.layers.{layer}.{name}.adapter.up"] = random(rows, RANK)
    return tensors


def base_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = {"model.embed_tokens.weight": torch.randn(30, HIDDEN, generator=generator).half()}
    return weights | {"model.norm.weight": torch.ones(HIDDEN).half()}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in place of the package's own, a cache, and a tiny original instead of the downloaded one."""

    def fill(folder: Path, report: embedded.Report) -> None:
        save_file(base_weights(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "linocut": {"banned_ids": [16]}}))
        embedded._write_marker(folder)

    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_fill_original", fill)
    monkeypatch.setattr(embedded, "DELTA", tmp_path / "package")
    return tmp_path / "package"


def write_conversion(folder: Path, tensors: dict[str, torch.Tensor], **linocut: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "linocut": LINOCUT | linocut}))
    (folder / "README.md").write_text("# The card")
    return folder


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    return write_conversion(tmp_path / "converted", adapter())


def test_what_is_shipped_is_served(package: Path, converted: Path) -> None:
    plain = embedded.ensure(progress=False)
    shipment = ship(converted)
    folder = embedded.ensure(progress=False)
    assert folder != plain == embedded.ensure(progress=False, adapted=False)
    found, expected = load_file(folder / "adapter.safetensors"), adapter()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float16
        assert found[name].shape == tensor.shape
        if ".adapter." in name:
            error = float((found[name].float() - tensor).norm() / tensor.norm())
            assert error == pytest.approx(shipment.errors[name], rel=1e-3)
            assert 0 < error < 0.01
            assert fits_float16(found[name].float())
        else:
            assert torch.equal(found[name], tensor.half())
    config = json.loads((folder / "config.json").read_text())
    assert config["linocut"] == {"banned_ids": [16], **LINOCUT}
    assert (folder / "README.md").read_text() == "# The card"
    assert shipment.files == {path.name: path.stat().st_size for path in package.glob("*.safetensors")}


def test_a_filter_goes_with_its_adapter(package: Path, converted: Path, tmp_path: Path) -> None:
    """Put there by itself or found beside the adapter; another adapter without one has none."""
    ship(converted)
    without = embedded.ensure(progress=False)
    trained = {name: torch.rand(shape) for name, shape in (("w1", (3, 4)), ("b1", 3), ("w2", (4, 3)), ("b2", 4))}
    save_file(trained, converted / "filter.safetensors")
    ship_filter(converted / "filter.safetensors")
    folder = embedded.ensure(progress=False)
    assert folder != without
    assert torch.equal(load_file(folder / "filter.safetensors")["w1"], trained["w1"])
    before = (package / "delta.json").read_bytes()
    ship(converted)
    assert (package / "delta.json").read_bytes() == before
    (converted / "filter.safetensors").unlink()
    ship(converted)
    assert embedded.ensure(progress=False) == without
    assert not (package / "filter.safetensors").exists()


def test_no_filter_is_shipped_without_a_delta_or_that_is_none(package: Path, converted: Path, tmp_path: Path) -> None:
    save_file({"w1": torch.rand(3, 4)}, converted / "filter.safetensors")
    with pytest.raises(ModelError, match="no delta"):
        ship_filter(converted / "filter.safetensors", tmp_path)
    (converted / "filter.safetensors").rename(tmp_path / "filter.safetensors")
    ship(converted)
    with pytest.raises(ModelError, match="no filter"):
        ship_filter(tmp_path / "filter.safetensors")


def test_half_precision_adapters_are_taken(package: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in adapter().items()}
    ship(write_conversion(tmp_path / "converted", tensors))
    found = load_file(embedded.ensure(progress=False) / "adapter.safetensors")
    for name, tensor in tensors.items():
        assert float((found[name].float() - tensor.float()).norm()) < 0.01 * float(tensor.float().norm())


def test_shipping_twice_gives_the_same_bytes(converted: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ship(converted, tmp_path / name)
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert a == b


def test_files_keep_to_their_limit(monkeypatch: pytest.MonkeyPatch, package: Path, converted: Path) -> None:
    monkeypatch.setattr(shipping, "_HEADER_SPARE", 2000)
    monkeypatch.setattr(shipping, "MAX_FILE_BYTES", 40_000)
    shipment = ship(converted)
    assert len(shipment.files) == 3
    assert max(shipment.files.values()) <= 40_000
    assert load_file(embedded.ensure(progress=False) / "adapter.safetensors").keys() == adapter().keys()


def test_an_older_delta_is_replaced_and_the_rest_left(
    monkeypatch: pytest.MonkeyPatch, package: Path, converted: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shipping, "_HEADER_SPARE", 2000)
        patch.setattr(shipping, "MAX_FILE_BYTES", 40_000)
        ship(converted)
    (package / "curve.png").write_bytes(b"png")
    first = embedded.ensure(progress=False)
    shipment = ship(write_conversion(converted, adapter(seed=1)))
    assert {path.name for path in package.iterdir()} == {*shipment.files, "README.md", "delta.json", "curve.png"}
    assert embedded.ensure(progress=False) != first


def test_what_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch, package: Path, converted: Path) -> None:
    monkeypatch.setattr(shipping, "MAX_BYTES", 50_000)
    with pytest.raises(ModelError, match="use a lower rank"):
        ship(converted)
    assert not package.exists()


@pytest.mark.usefixtures("package")
class TestRefusals:
    def test_a_conversion_without_an_adapter(self, converted: Path) -> None:
        (converted / "config.json").write_text(json.dumps({"linocut": {"context": "block-causal"}}))
        with pytest.raises(ModelError, match="names no adapter to ship"):
            ship(converted)

    def test_an_adapter_on_clean_rows(self, converted: Path) -> None:
        with pytest.raises(ModelError, match="gate 'all' cannot be shipped"):
            ship(write_conversion(converted, adapter(), adapter={"rank": RANK, "gate": "all"}))

    def test_missing_weights(self, converted: Path) -> None:
        (converted / "adapter.safetensors").unlink()
        with pytest.raises(ModelError, match=r"adapter\.safetensors cannot be read"):
            ship(converted)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_the_same_base_weights_pass_in_any_precision(self, converted: Path, dtype: torch.dtype) -> None:
        weights = {name: tensor.to(dtype) for name, tensor in base_weights().items()}
        head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        save_file(weights | head, converted / "model.safetensors")
        ship(converted)

    @pytest.mark.parametrize(
        ("added", "sentence"),
        [
            ({"model.norm.weight": torch.full((HIDDEN,), 1.1)}, "the base was changed"),
            ({"model.norm.weight": torch.ones(HIDDEN + 1)}, "the base was changed"),
            ({"norm": torch.ones(HIDDEN)}, "the base was changed"),
            ({}, "lacks 1 tensors of the embedded model"),
        ],
        ids=["changed", "another shape", "another name", "lost"],
    )
    def test_other_base_weights(self, converted: Path, added: dict[str, torch.Tensor], sentence: str) -> None:
        weights = base_weights()
        del weights["model.norm.weight"]
        weights |= added
        save_file(weights, converted / "model.safetensors")
        with pytest.raises(ModelError, match=sentence):
            ship(converted)
