"""`linocut doctor` on this machine, and on ones that lack something."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from linocut.kernels.check import Outcome
from linocut.server import cli

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS = ["--device", "cpu", "--dtype", "float32", "--max-model-len", "256", "--kv-memory", str(1 << 20)]


def lines_of(output: str) -> dict[str, str]:
    return {line[:22].strip(): line[23:] for line in output.splitlines()}


def test_it_says_what_this_machine_can_run():
    result = CliRunner().invoke(cli.app, ["doctor", str(GOLDEN / "sdar"), *OPTIONS])
    assert result.exit_code == 0, result.output
    found = lines_of(result.output)
    assert {"python", "torch", "device", "memory", "kernels", "model", "page budget", "writing"} <= set(found)
    passed, _, number = found["kernels"].removeprefix("torch, ").removesuffix(" checks passed").partition(" of ")
    assert int(passed) == int(number) > 20
    assert found["writing"].startswith("32 of 32 tokens")


@pytest.mark.parametrize(
    ("arguments", "line", "words"),
    [
        (["doctor", str(GOLDEN), *OPTIONS], "model", "ModelError"),
        (["doctor", str(GOLDEN / "sdar"), *OPTIONS[:-1], "100"], "model", "hold no sequence"),
        (["doctor", "--no-load", "--device", "tpu"], "device", "is not a device name"),
    ],
)
def test_what_does_not_work_is_named(arguments, line, words):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert lines_of(result.output)[line].startswith("FAILED: ")
    assert words in lines_of(result.output)[line]


def test_a_kernel_that_computes_nonsense_is_named(monkeypatch):
    from linocut.engine import doctor

    monkeypatch.setattr(doctor, "self_test", lambda device: [Outcome("fine", 0.0, 1.0), Outcome("rope", 2.0, 1.0)])
    result = CliRunner().invoke(cli.app, ["doctor", "--no-load", "--device", "cpu"])
    assert result.exit_code == 1
    assert lines_of(result.output)["kernels"] == "FAILED: torch, 1 of 2 checks passed: rope"
