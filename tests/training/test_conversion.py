"""`linocut convert run` with nothing replaced: a model that counts learns to count several steps ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoint import END, write_tiny_checkpoint
from typer.testing import CliRunner

from linocut.engine.llm import LLM
from linocut.server.convert import app


def write_counting_checkpoint(folder: Path) -> Path:
    """Says the id after the last one, up to the highest, then ends. Its attention and MLPs add nothing."""
    from safetensors.torch import load_file, save_file

    write_tiny_checkpoint(folder, hidden=64)
    weights = load_file(folder / "model.safetensors")
    words = weights["model.embed_tokens.weight"]
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    head = words.roll(1, dims=0)
    head[END] = words[-1]
    weights["lm_head.weight"] = head.contiguous()
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["linocut"] = {"mask_token_id": 4, "banned_ids": [0]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_prompts(path: Path, count: int, start: int) -> Path:
    records = ({"prompt": f"{start + index} {chr(97 + index % 26)}"} for index in range(count))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.timeout(600)
def test_a_conversion_from_prompts_to_a_table(tmp_path: Path) -> None:
    base = write_counting_checkpoint(tmp_path / "base")
    train = write_prompts(tmp_path / "train.jsonl", 60, 100)
    held_out = write_prompts(tmp_path / "held_out.jsonl", 6, 900)
    out = tmp_path / "out"
    command = ["run", str(base), str(out), "--prompts", str(train), "--evaluate-on", str(held_out)]
    options = {
        "generate.max_tokens": 64,
        "generate.sampled_share": 0,
        "generate.truncated_share": 1,
        "adapt.max_steps": 150,
        "adapt.length": 128,
        "adapt.rows": 8,
        "adapt.held_out": 8,
        "adapt.rank": 32,
        "adapt.learning_rate": 0.01,
        "adapt.draft_head": "true",
        "evaluate.max_tokens": 40,
        "evaluate.settings": json.dumps(["autoregressive", "verify,row_cost=0", "threshold,threshold=0.5"]),
    }
    command += [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    result = CliRunner().invoke(app, [*command, "--adapt-seconds", "3000"])
    assert result.exit_code == 0, result.output

    records = [json.loads(line) for line in (out / "adapt" / "log.jsonl").read_text().splitlines()]
    held = [record for record in records if record["kind"] == "held-out"]
    assert held[0]["accepted"] < 0.5
    assert held[-1]["head_accepted"] > 2
    assert (out / "adapt" / "training.svg").stat().st_size > 1000

    rows = {row["label"]: row for row in json.loads((out / "evaluation" / "evaluation.json").read_text())["rows"]}
    verified = next(row for label, row in rows.items() if "verify" in label)
    assert verified["tokens_per_forward"] > 2
    assert verified["same_as_own"] == 1.0

    model = LLM(str(out / "adapted"), dtype="float32")
    answer = model.chat([[{"role": "user", "content": "950 q"}]], max_tokens=24, temperature=0.0)[0][0]
    assert answer.token_ids == list(range(answer.token_ids[0], answer.token_ids[0] + 24))
    assert answer.forwards <= 12

    again = CliRunner().invoke(app, [*command, "--adapt-seconds", "3000"])
    assert again.exit_code == 0
    assert [line.split() for line in again.output.splitlines()[:3]] == [
        ["generate", "complete"],
        ["adapt", "complete"],
        ["evaluate", "complete"],
    ]
