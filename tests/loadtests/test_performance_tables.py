"""The tables of docs/performance.md, from made-up rows, and the document itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.performance.results import Results
from loadtests.performance.tables import BEGIN, END, put_into, tables
from loadtests.performance.targets import targets

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def made_up() -> list[dict[str, Any]]:
    """Sheets whose numbers are easy to divide."""
    forward = {"point": "forward", "context": 1024, "positions": 32.0, "device_ms": 3.0, "gap_ms": 0.2}
    block = "block 32, sub-block 8"
    curve = {"point": "curve", "mode": block}
    return [
        {
            "task": "fast-dllm-v2",
            "engine": "linocut",
            "floor_ms": 4.0,
            "copy_GBps": 4000,
            "machine": {"device": "Card", "torch": "2"},
            "rows": [
                {**forward, "mode": block, "asked": 1, "sequences": 1, "step_ms": 4.4},
                {**forward, "mode": block, "asked": 8, "sequences": 8, "step_ms": 5.0},
                {**forward, "mode": block, "asked": 64, "sequences": 64, "step_ms": 10.0},
                {**forward, "mode": block, "asked": 256, "sequences": 230, "step_ms": 20.0, "context": 8192},
                {**curve, "asked": 1, "wanted": 4, "tokens_per_second": 700.0, "tokens_per_forward": 4.0},
                {**curve, "asked": 64, "wanted": 3, "tokens_per_second": 9000.0, "tokens_per_forward": 2.5},
                {"point": "profile", "mode": block, "asked": 1, "sequences": 1, "context": 1024, "busy_ms": 2.5,
                 "kernels": [["gemm<64>", 2.0, 197.0], ["others", 0.5, 40.0]]},
                {"point": "curve", "mode": block, "asked": 256, "wanted": 1, "error": "RuntimeError: memory"},
            ],
        },
        {
            "task": "embedded",
            "engine": "linocut",
            "rows": [
                {"point": "clients", "mode": "verify", "asked": 1, "tokens_per_second": 1200.0, "first_token_s": 0.01,
                 "tokens_per_forward": 2.5},
                {"point": "prefill", "mode": "autoregressive", "asked": 64, "prompt": 512, "seconds": 0.1,
                 "first_token_s": 0.06, "tokens_per_second": 327680.0},
            ],
        },
        {
            "task": "http",
            "engine": "linocut",
            "rows": [
                {"point": "http", "mode": "verify", "asked": 1, "tokens_per_second": 900.0, "first_token_s": 0.02},
            ],
        },
        {
            "task": "qwen2.5-7b",
            "engine": "vLLM 9",
            "rows": [
                {"point": "decode", "asked": 1, "tokens_per_second": 200.0},
                {"point": "decode", "asked": 64, "tokens_per_second": 10000.0},
            ],
        },
        {
            "task": "smollm2-135m",
            "engine": "vLLM 9",
            "rows": [
                {"point": "clients", "asked": 1, "tokens_per_second": 400.0, "first_token_s": 0.005},
                {"point": "prefill", "asked": 64, "prompt": 512, "seconds": 0.095, "first_token_s": 0.05,
                 "tokens_per_second": 344926.0},
            ],
        },
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for sheet in made_up():
        (tmp_path / f"{sheet['task']}.json").write_text(json.dumps(sheet))
    return tmp_path


def test_targets_are_met_or_missed_or_not_measured() -> None:
    found = {(target.what.split(",")[0], target.where): target for target in targets(Results(made_up()))}
    block = "block 32, sub-block 8"

    def verdict(what: str, where: str) -> tuple[float | None, str]:
        target = found[what, where]
        return None if target.value is None else round(target.value, 4), target.verdict

    assert verdict("a denoise forward", "block 32, 1 sequence, context 1k") == (1.1, "met")
    assert verdict("a denoise forward", "block 32, 8 sequences, context 1k") == (1.25, "missed")
    idle = "the device idle between forwards"
    assert verdict(idle, f"{block}, 64 sequences, context 1k") == (0.02, "met")
    assert verdict("tokens/s", f"{block}, 1 sequence, 4 tokens a forward") == (3.5, "missed")
    assert verdict("tokens/s", f"{block}, 64 sequences, 3 tokens a forward") == (0.9, "missed")
    assert verdict("tokens/s", "embedded model, verify, 1 client") == (3.0, "met")
    assert verdict("tokens/s", "embedded model, verify, 64 clients") == (None, "not measured")
    assert verdict("prefill tokens/s", "embedded model: autoregressive, 64 × 512") == (0.95, "met")


def test_tables_hold_every_number_and_its_ratio(folder: Path) -> None:
    text = tables(folder)
    lines = text.splitlines()
    assert "Card, torch 2; a copy moves 4,000 GB/s; at that the 7B shape's weights are read in 4.00 ms" in text
    name = "7B as Fast-dLLM v2: block 32, sub-block 8"
    assert f"| {name} | 8,192 | 230 (fit) | 32 | 20.00 | 3.00 | 0.200 | 5.00 |" in lines
    assert f"| {name} |  | 700 (3.50×) |" in lines
    assert f"| {name} | 9,000 at 2.50 (0.90×) |  |" in lines
    assert f"{name}, 1 sequence, context 1,024: kernels run for 2.50 ms of a step." in lines
    assert "| `gemm<64>` | 2.000 | 197 |" in lines
    assert "| verify | 1 | 1,200 | 900 | 75% | 3.00 | 2.25 | 2.50 | 10.0 | 20.0 |" in lines
    assert "| embedded model: autoregressive | 64 × 512 | 60.0 | 100.0 | 327,680 | 0.95 |" in lines
    assert "- fast-dllm-v2: point curve, mode block 32, sub-block 8, asked 256, wanted 1: RuntimeError: memory" in lines
    widths = {line.count(" | ") for line in lines if line.startswith("| verify") or line.startswith("| decoding | cl")}
    assert len(widths) == 1


def test_an_empty_folder_has_no_tables(tmp_path: Path) -> None:
    assert tables(tmp_path).strip() == ""


def test_tables_go_between_the_lines_that_say_so() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put_into(document, "new\n") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert put_into(put_into(document, "new\n"), "new\n") == put_into(document, "new\n")
    with pytest.raises(ValueError, match="no lines"):
        put_into("before", "new")


def test_the_document_shows_the_sheets_beside_it() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert put_into(document, tables(DOCUMENT.with_suffix(""))) == document
