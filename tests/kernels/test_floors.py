"""The table of kernels against their floors: its cases run, and its arithmetic is right. Times need a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from linocut.kernels import floors
from linocut.kernels.floor_cases import MixtureShape, ModelShape, Setting, all_cases
from linocut.kernels.floor_table import BEGIN, END, Ceilings, Line, into_page, render

TINY = ModelShape("tiny", 32, 4, 2, 16, 48, 80, True)
MIXED = MixtureShape("mixed", 32, 16, 4, 2)
CEILINGS = Ceilings(copy=2e12, read=4e12, matrix=1e15, empty=1e-6)


def test_every_case_can_be_run():
    setting = Setting(torch.device("cpu"), "torch", quick=True, dtype=torch.float32)
    kernels = set()
    for case in all_cases(setting, [TINY], [MIXED]):
        assert case.moved > 0, case
        assert case.calls[0]() is not None
        kernels.add(case.kernel)
    assert {"staircase attention", "rope + cache write", "residual + norm", "gated activation"} <= kernels
    assert {"experts", "head + statistics", "qkv product", "down product"} <= kernels


def test_the_floor_is_the_longest_of_bytes_operations_and_an_empty_kernel():
    assert CEILINGS.floor(8_000_000, 0.0) == pytest.approx(2e-6)
    assert CEILINGS.floor(8_000_000, 5e9) == pytest.approx(5e-6)
    assert CEILINGS.floor(8, 8.0) == pytest.approx(1e-6)


def test_the_table_says_what_bounds_a_kernel_and_how_far_it_is():
    lines = [
        Line("norm", "8 rows", CEILINGS.floor(8_000_000, 0.0), 3e-6, 8_000_000, 0.0),
        Line("product", "8 rows", CEILINGS.floor(0, 5e9), 5e-6, 0, 5e9),
        Line("norm", "1 row", CEILINGS.floor(8, 0.0), 4e-6, 8, 0.0),
    ]
    table = render(CEILINGS, lines, "a GPU")
    assert "| 8 rows | 3.0 | 2.0 | memory | 1.50 |" in table
    assert "| 1 row | 4.0 | 1.0 | launch | 4.00 |" in table
    assert "| 8 rows | 5.0 | 5.0 | matrix | 1.00 |" in table
    assert table.count("| norm |") == 1, "lines of one kernel stand together"


def test_a_table_can_be_made_of_an_earlier_run(tmp_path, capsys):
    line = Line("norm", "8 rows", 2e-6, 3e-6, 8_000_000, 0.0)
    file = tmp_path / "floors.json"
    file.write_text(json.dumps({"device": "a GPU", "ceilings": vars(CEILINGS), "lines": [vars(line)]}))
    assert floors.main(["--render", str(file)]) == 0
    assert "| 8 rows | 3.0 | 2.0 | memory | 1.50 |" in capsys.readouterr().out


def test_the_table_takes_its_place_in_a_page(tmp_path):
    line = Line("norm", "8 rows", 2e-6, 3e-6, 8_000_000, 0.0)
    file, page = tmp_path / "floors.json", tmp_path / "page.md"
    file.write_text(json.dumps({"device": "a GPU", "ceilings": vars(CEILINGS), "lines": [vars(line)]}))
    page.write_text(f"before\n{BEGIN}\nan older table\n{END}\nafter\n")
    assert floors.main(["--render", str(file), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "an older table" not in text
    assert "| 8 rows | 3.0 | 2.0 | memory | 1.50 |" in text
    with pytest.raises(ValueError, match="no place for the table"):
        into_page("nothing", "table")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert floors.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
