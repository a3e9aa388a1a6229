"""Drafts of a draft head in one call of a kernel: when, and that they are those which torch makes one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from converted import converted_folder
from safetensors.torch import load_file, save_file
from test_verify import core_of
from tiny_engines import prompt_of, request, run

from linocut.engine.core import EngineCore
from linocut.engine.drafting import Drafter
from linocut.engine.models.draft_head import DraftHead
from linocut.engine.models.embedded import cache_root
from linocut.kernels.draft_native import NativeDrafts
from linocut.kernels.native import load_native, multiplies_integers

RULE = {"row_cost": 0.0, "draft_length": 5}


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    if not load_native(cache_root() / "native"):
        pytest.skip("no AVX2, or no C compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the head are values of float16, as a folder that is shipped has them."""
    folder = converted_folder(tmp_path_factory.mktemp("converted"), draft_head=0.3)
    tensors = load_file(folder / "adapter.safetensors")
    save_file({name: value.half().float() for name, value in tensors.items()}, folder / "adapter.safetensors")
    return folder


def head_of(core: EngineCore) -> DraftHead:
    head = core.runner.decoder.draft_head
    assert head is not None
    return head


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the kernel."""
    calls: list[int] = []
    whole = NativeDrafts.run

    def noted(self: NativeDrafts, *arguments: Any) -> Any:
        calls.append(len(arguments[-1]))
        return whole(self, *arguments)

    monkeypatch.setattr(NativeDrafts, "run", noted)
    return calls


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_drafts_and_confidences_are_those_of_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    if quantization == "int8" and not multiplies_integers():
        pytest.skip("a CPU with AVX-512 and without VNNI")
    core, draft, calls = core_of(folder, quantization=quantization), Drafter.draft, count_calls(monkeypatch)
    head, met = head_of(core), [0, 0]
    native = head.native

    def both(self: Drafter, state: Any, *arguments: Any) -> None:
        found = []
        for kernel in (None, native):
            kept = state.tokens.clone(), state.drafts.clone(), state.draft_confidence.clone()
            head.native = kernel
            draft(self, state, *arguments)
            found.append((state.tokens.clone(), state.drafts.clone(), state.draft_confidence.clone()))
            if kernel is None:
                for tensor, value in zip((state.tokens, state.drafts, state.draft_confidence), kept, strict=True):
                    tensor.copy_(value)
        (tokens, counts, sure), (own, own_counts, own_sure) = found
        assert torch.equal(counts, own_counts)
        same = (tokens == own).all(1)
        met[0] += len(same)
        met[1] += int(same.sum())
        # In integers a rounding of activations may go the other way.
        slack = 1e-4 if quantization == "none" else 0.05
        torch.testing.assert_close(own_sure[same], sure[same], rtol=slack, atol=1e-6)

    monkeypatch.setattr(Drafter, "draft", both)
    rules = [RULE, {"row_cost": 0.0, "draft_length": 12}, {}]
    run(core, [request(core, str(at), prompt_of(7 + at, seed=at), 40, rule) for at, rule in enumerate(rules)])
    assert len(calls) > 20
    assert max(calls) == 3
    assert met[1] >= (1.0 if quantization == "none" else 0.99) * met[0]


def test_rows_that_sample_leave_it_to_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, core = count_calls(monkeypatch), core_of(folder)
    run(core, [request(core, "a", prompt_of(7), 20, RULE, temperature=0.8, seed=1)])
    assert not calls
    run(core, [request(core, "b", prompt_of(7), 20, RULE)])
    assert calls


def test_forwards_are_those_of_torchs_drafts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No draft changes a text, but a worse one takes more forwards."""
    calls, core = count_calls(monkeypatch), core_of(folder)

    def found() -> dict[tuple[str, int], tuple[list[int], int]]:
        asked = [request(core, str(at), prompt_of(7 + at, seed=at), 40, RULE) for at in range(3)]
        return {name: (answer.tokens, answer.forwards) for name, answer in run(core, asked).items()}

    native = found()
    assert calls
    head_of(core).native = None
    assert found() == native


def test_weights_that_the_kernels_do_not_have_leave_it_to_torch(tmp_path: Path, folder: Path) -> None:
    assert head_of(core_of(folder)).native is not None
    assert head_of(core_of(folder, attention="torch")).native is None
    assert head_of(core_of(converted_folder(tmp_path, draft_head=0.3))).native is None
