"""docs/comparison.md shows the tables of the evaluations beside it, as they were written."""

import json

import pytest
from checkout import ROOT

from linocut.training.evaluate_table import markdown


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_the_comparison_shows_its_evaluations(name: str) -> None:
    result = json.loads((ROOT / "docs" / "comparison" / f"{name}.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) > 10
    assert markdown(result).strip() in (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
