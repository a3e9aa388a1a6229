"""The canvas core: a lane of choices, each with its own steps, prompt and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from canvas_engines import answer, canvas_core, request, run
from plain_canvas import END, MASK, SIZES, PlainSampler, write_canvas

from linocut.engine.canvas.core import CanvasCore
from linocut.engine.errors import ParameterError
from linocut.engine.llm import LLM
from linocut.engine.messages import Abort

LENGTH = SIZES["length"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canvas")
    write_canvas(folder)
    return folder


@pytest.fixture
def core(folder: Path) -> CanvasCore:
    return canvas_core(folder, token_budget=8 * LENGTH)


MIX: list[tuple[list[int], dict[str, Any]]] = [
    ([], {"diffusion": {"strategy": "ancestral", "steps": 9}, "seed": 1}),
    ([65, 66], {"diffusion": {"strategy": "guided", "steps": 4}, "seed": 2}),
    ([65, 66], {"diffusion": {"strategy": "ancestral", "steps": 3}, "temperature": 0.0}),
    ([70] * 20, {"diffusion": {"strategy": "ancestral", "steps": 12}, "seed": 3, "top_k": 5, "temperature": 0.7}),
    ([], {"diffusion": {"strategy": "guided", "steps": 5, "rerank_steps_ratio": 1.0}, "seed": 4, "top_p": 0.8}),
    ([71], {"diffusion": {"strategy": "guided", "steps": 5, "num_candidates": 2}, "seed": 5, "min_p": 0.1}),
    ([72], {"diffusion": {"strategy": "ancestral", "steps": 40}, "seed": 6, "ignore_eos": False, "min_tokens": 3}),
]


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_text_does_not_depend_on_its_neighbours(core: CanvasCore, delay: int) -> None:
    requests = [request(core, str(i), prompt, n=2, **fields) for i, (prompt, fields) in enumerate(MIX)]
    alone = {}
    for one in requests:
        alone |= {key: answer(outputs) for key, outputs in run(core, one).items()}
    together = run(core, *requests, delay=delay)
    assert {key: answer(outputs) for key, outputs in together.items()} == alone
    assert len({tuple(text) for text in alone.values()}) >= len(alone) - 1  # only the greedy choices may agree


def test_a_forward_without_memory_is_tried_again_smaller(core: CanvasCore, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(core, str(i), prompt, n=2, **fields) for i, (prompt, fields) in enumerate(MIX)]
    expected = {key: answer(outputs) for key, outputs in run(core, *requests).items()}
    whole, sizes = core._denoise, []

    def starved(kind: Any, rows: list[Any]) -> None:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole(kind, rows)

    monkeypatch.setattr(core, "_denoise", starved)
    assert {key: answer(outputs) for key, outputs in run(core, *requests).items()} == expected
    assert max(sizes) > 2
    assert core.stats().out_of_memory == sum(size > 2 for size in sizes) < 10


def test_a_canvas_that_does_not_fit_alone_ends_by_an_error(core: CanvasCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(core, "_denoise", starved)
    outputs = run(core, request(core, "a", [65]), request(core, "b", [66]))
    assert {key[0]: (last.finish_reason, last.error) for key, (last,) in outputs.items()} == {
        "a": ("error", "out of memory"), "b": ("error", "out of memory")
    }  # fmt: skip


@pytest.mark.parametrize("steps", [1, 4, 11])
def test_a_text_takes_its_steps(core: CanvasCore, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    hidden = core._model.denoiser.hidden
    monkeypatch.setattr(core._model.denoiser, "hidden", lambda *given: calls.append(1) or hidden(*given))
    done = run(core, request(core, "r", [65], diffusion={"strategy": "ancestral", "steps": steps}))["r", 0]
    # What the last step leaves masked (a position in 100,000, times the steps) takes one forward more.
    assert done[-1].forwards == len(calls) == steps
    assert done[-1].positions == steps * LENGTH
    assert done[-1].finish_reason == "length"
    stats = core.stats()
    assert stats.forwards == steps == sum(stats.forward_rows.counts) == sum(stats.forward_seconds.counts)
    assert sum(stats.steps_per_block.counts) == stats.blocks_finished > 0


def test_masks_that_the_last_step_leaves_are_drawn_at_once(core: CanvasCore) -> None:
    asked = request(core, "r", [65], diffusion={"strategy": "guided", "steps": 2})
    core.add(asked)
    (row,) = core._waiting
    row.step = 2
    (output,) = core.step()
    assert output.finish_reason == "length"
    assert len(output.token_ids) == LENGTH - 2
    assert MASK not in output.token_ids


def test_the_text_up_to_the_first_mask_comes_as_it_is_decided(core: CanvasCore) -> None:
    """...and the canvas is left alone once the answer is complete."""
    whole = request(core, "whole", [65], diffusion={"strategy": "ancestral", "steps": 16})
    outputs = run(core, whole)["whole", 0]
    assert len(outputs) > 2
    short = run(core, request(core, "short", [65], max_tokens=3, diffusion={"strategy": "ancestral", "steps": 16}))
    assert answer(short["short", 0]) == answer(outputs)[:3]
    assert short["short", 0][-1].finish_reason == "length"
    assert short["short", 0][-1].forwards <= 16
    assert core.stats().discarded_tokens > 0
    assert core.stats().committed_tokens == len(answer(outputs)) + 3


def test_a_prompt_is_pinned_behind_the_begin_id(core: CanvasCore, folder: Path, tmp_path: Path) -> None:
    """A client that writes the begin id itself gets the same."""
    student, _ = write_canvas(tmp_path)
    fields = {"diffusion": {"strategy": "ancestral", "steps": 6}, "ignore_eos": False, "max_tokens": 4}
    bare = answer(run(core, request(core, "a", [65, 66], **fields))["a", 0])
    own = answer(run(core, request(core, "b", [END, 65, 66], **fields))["b", 0])
    plain = PlainSampler(student, None, LENGTH).sample([END, 65, 66], 7, 0, 6)
    assert bare == own == plain[3 : 3 + len(bare)]


def test_a_begin_id_that_the_model_draws_is_no_part_of_the_text(core: CanvasCore) -> None:
    core.add(request(core, "r", [], max_tokens=5, ignore_eos=False))
    (row,) = core._waiting
    row.tokens[:4] = torch.tensor([END, 65, 66, END])
    row.undecided[:4] = False
    (output,) = core.step()
    assert output.token_ids == [65, 66, END]
    assert (output.finish_reason, output.stop_token) == ("stop", END)


def test_a_mask_id_in_a_prompt_is_pinned_too(core: CanvasCore) -> None:
    core.add(request(core, "r", [65, MASK, 66], diffusion={"strategy": "ancestral", "steps": 2}))
    (row,) = core._waiting
    assert not row.undecided[:4].any()
    while core.busy:
        core.step()
    assert row.tokens[:4].tolist() == [END, 65, MASK, 66]


def test_stop_ids_wait_for_min_tokens(tmp_path: Path) -> None:
    """With five tokens, of which one ends the text, stops are everywhere."""
    write_canvas(tmp_path, vocab=6, length=40, ends=False, tokenizer=False)
    core = canvas_core(tmp_path, stop_ids=(4,))
    lengths: dict[int, list[int]] = {0: [], 6: []}
    for minimum, found in lengths.items():
        done = run(core, request(core, "r", [1], n=24, ignore_eos=False, min_tokens=minimum))
        for outputs in done.values():
            text = answer(outputs)
            assert 4 not in text[:-1]
            if outputs[-1].finish_reason == "stop":
                assert (text[-1], outputs[-1].stop_token) == (4, 4)
                found.append(len(text))
    assert min(lengths[0]) < 6 < min(lengths[6])
    (outputs,) = run(core, request(core, "r", [1], stop_token_ids=(2,), ignore_eos=True)).values()
    assert answer(outputs)[-1] == 2  # a client's own id ends the text; the model's is not drawn at all
    assert 4 not in answer(outputs)


def test_temperature_0_takes_the_likeliest_tokens(core: CanvasCore, tmp_path: Path) -> None:
    student, _ = write_canvas(tmp_path)
    greedy = run(core, request(core, "a", [65], temperature=0.0, diffusion={"strategy": "ancestral", "steps": 1}))
    with torch.no_grad():
        canvas = torch.tensor([[END, 65] + [MASK] * (LENGTH - 2)])
        logits = student(canvas, torch.zeros(1))[0, 2:]
    logits[:, MASK] = -torch.inf
    logits[:, END] = -torch.inf  # ignore_eos
    assert answer(greedy["a", 0]) == logits.argmax(-1).tolist()
    one = {"top_k": 1, "diffusion": {"strategy": "ancestral", "steps": 1}}
    assert answer(run(core, request(core, "b", [65], **one))["b", 0]) == answer(greedy["a", 0])


def test_requests_wait_for_a_place_and_can_be_aborted(folder: Path) -> None:
    core = canvas_core(folder, max_running=2)
    slow = {"diffusion": {"strategy": "ancestral", "steps": 500}}
    core.add(request(core, "a", [65], n=2, **slow))
    core.add(request(core, "b", [66], n=2, **slow))
    core.step()
    assert (core.stats().running, core.stats().waiting) == (2, 2)
    core.abort(Abort(request_id="a", choice=1))
    core.step()
    assert (core.stats().running, core.stats().waiting) == (2, 1)
    core.abort(Abort(request_id="b"))
    core.abort(Abort(request_id="nobody"))
    assert (core.stats().running, core.stats().waiting) == (1, 0)
    core.abort(Abort(request_id="a"))
    assert not core.busy


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        ([65], {"max_tokens": LENGTH - 1}, "max_tokens"),
        ([65] * (LENGTH - 1), {"max_tokens": 1}, "max_tokens"),
        ([MASK + 1], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([65], {"stop_token_ids": (MASK + 1,)}, "stop_token_ids"),
        ([65], {"min_tokens": LENGTH}, "min_tokens"),
        ([65], {"diffusion": {"steps": 0}}, "diffusion.steps"),
        ([65], {"diffusion": {"steps": 4097}}, "diffusion.steps"),
        ([65], {"diffusion": {"strategy": "ancestral", "num_candidates": 2}}, "diffusion.num_candidates"),
        ([65], {"diffusion": {"strategy": "guided", "num_candidates": 17}}, "diffusion.num_candidates"),
        ([65], {"diffusion": {"strategy": "guided", "guidance_scale_end": -1.0}}, "diffusion.guidance_scale_end"),
        ([65], {"diffusion": {"strategy": "guided", "rerank_steps_ratio": 1.5}}, "diffusion.rerank_steps_ratio"),
        ([65], {"diffusion": {"strategy": "threshold"}}, "diffusion.strategy"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    core: CanvasCore, prompt: list[int], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ParameterError) as refused:
        core.add(request(core, "r", prompt, **fields))
    assert refused.value.param == param
    assert not core.busy


def test_a_running_requests_id_is_taken(core: CanvasCore) -> None:
    core.add(request(core, "r", [65]))
    with pytest.raises(ParameterError, match="in use"):
        core.add(request(core, "r", [65]))


def test_the_offline_api_serves_it(folder: Path) -> None:
    llm = LLM(str(folder), device="cpu", dtype="float32")
    (completion,) = llm.generate([[65, 66]], max_tokens=8, seed=3, diffusion={"steps": 4})[0]
    assert 1 <= len(completion.token_ids) <= 8
    with pytest.raises(ParameterError, match="conversations"):
        llm.chat([[{"role": "user", "content": "hello"}]])
