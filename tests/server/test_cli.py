from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linocut.engine.errors import ConfigError
from linocut.server import cli


def test_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip()


def test_the_servers_modules_do_not_import_torch():
    code = (
        "import sys, linocut.server.cli, linocut.server.lifecycle, linocut.server.announcement,"
        " linocut.engine.models.source;"
        " found = {'torch', 'transformers'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("threshold=0.8", ("threshold", 0.8)),
        ("denoising_steps=4", ("denoising_steps", 4)),
        ("sub_block_cache=true", ("sub_block_cache", True)),
        ("order=sequential", ("order", "sequential")),
    ],
)
def test_strategy_parameters(text, expected):
    found = cli._parse_parameter(text)
    assert found == expected
    assert type(found[1]) is type(expected[1])


@pytest.mark.parametrize("text", ["threshold", "=1", ""])
def test_bad_strategy_parameters(text):
    with pytest.raises(ConfigError):
        cli._parse_parameter(text)


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("1000", 1000), ("2G", 2 << 30), ("1.5MiB", 3 << 19), ("8k", 8192)]
)
def test_memory_sizes(text, expected):
    assert cli._parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1", "2 T", "lots"])
def test_bad_memory_sizes(text):
    with pytest.raises(ConfigError):
        cli._parse_bytes(text)


def test_default_names(tmp_path: Path):
    assert cli._default_name("org/model", Path("cache/x")) == "org/model"
    assert cli._default_name(str(tmp_path), tmp_path) == tmp_path.name
    assert cli._default_name(None, Path("smollm2-135m-instruct-b179c9523d0e-1")) == "smollm2-135m-instruct"
