"""docs/strategies.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from linocut.engine.decoding.registry import offered, strategy_classes
from linocut.engine.decoding.table import families, strategy_tables

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"


def test_the_page_is_written_from_the_code() -> None:
    assert PAGE.read_text() == strategy_tables(), "run: linocut strategies > docs/strategies.md"


def test_every_strategy_is_valid_somewhere_and_says_where_it_comes_from() -> None:
    tables = [offered(traits).strategy_table for traits in families().values()]
    for name in strategy_classes():
        infos = [next(info for info in table if info.name == name) for table in tables]
        assert any(not info.refusal for info in infos), name
        assert infos[0].source, name
        assert infos[0].summary, name


def test_every_parameter_is_described() -> None:
    for traits in families().values():
        for info in offered(traits).strategy_table:
            for parameter in info.parameters:
                assert parameter.description, f"{info.name}.{parameter.name}"
