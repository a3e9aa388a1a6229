"""Checkpoints: a run goes on with other limits and places, and does not go on to learn something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_training import (
    LENGTHS,
    PROMPTS,
    make_documents,
    make_folder,
    make_settings,
    read_log,
    save_documents,
    save_model,
)

from linocut.engine.errors import ConfigError
from linocut.training.adapt import adapt
from linocut.training.checkpoint import identity, load_checkpoint
from linocut.training.trainer import Trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def test_a_checkpoint_of_another_rank_is_refused(folder: Path) -> None:
    adapt(make_settings(folder, max_steps=1))
    with pytest.raises(ConfigError, match="another run folder"):
        adapt(make_settings(folder, max_steps=1, rank=4))


def test_a_checkpoint_of_another_conversion_is_refused_by_name(folder: Path) -> None:
    adapt(make_settings(folder, max_steps=1))
    shutil.copytree(folder / "base", folder / "sibling")
    for name, value in (
        ("mode", "lora"), ("logit_source", "own"), ("scale", 1.0), ("seed", 1), ("mask_token_id", 254),
        ("base", str(folder / "sibling")),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"with {name} .*another run folder"):
            adapt(make_settings(folder, max_steps=1, **{name: value}))
    shutil.rmtree(folder / "run")
    lora = {"mode": "lora", "max_steps": 1}
    adapt(make_settings(folder, **lora))
    with pytest.raises(ConfigError, match="with context token-causal"):
        adapt(make_settings(folder, context="block-causal", **lora))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 2e-3), ("ce", 0.5), ("kl", 0.5), ("certainty", 1.0), ("segments", [2, 4]), ("partial", 0.5),
        ("segment_weights", [1.0, 1.0, 2.0]), ("length", 32), ("rows", 1), ("accumulate", 2), ("held_out", 2),
        ("warm_up", 0.5), ("beta2", 0.9), ("weight_decay", 0.1), ("offset_decay", 0.5),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_to_learn_something_else(folder: Path, name: str, value: object) -> None:
    adapt(make_settings(folder, max_steps=1))
    with pytest.raises(ConfigError, match=f"of a run with {name} .* go on with the same settings"):
        adapt(make_settings(folder, max_steps=2, **{name: value}))
    assert json.loads((folder / "run" / "settings.json").read_text())["max_steps"] == 1


def test_a_run_goes_on_with_another_end_pace_log_and_folder(folder: Path) -> None:
    adapt(make_settings(folder, max_steps=1))
    (folder / "moved").mkdir()
    for name in ("base", "answers"):
        (folder / name).rename(folder / "moved" / name)
    adapt(
        make_settings(
            folder, max_steps=2, max_seconds=600.0, max_tokens=10**9, session_seconds=600.0, checkpoint_seconds=1.0,
            evaluate_seconds=1.0, log_every=2, dtype="float64", head_chunk=64, block_size=8, banned_ids=[7],
            output=str(folder / "elsewhere"), base=str(folder / "moved" / "base"),
            data=[str(folder / "moved" / "answers")],
        )
    )  # fmt: skip
    assert read_log(folder / "run")[-1]["step"] == 2
    own = json.loads((folder / "elsewhere" / "config.json").read_text())["linocut"]
    assert (own["block_size"], own["banned_ids"]) == (8, [7, 255])


def test_a_run_does_not_go_on_with_other_data_or_another_beginning(folder: Path) -> None:
    adapt(make_settings(folder, max_steps=1))
    start = folder / "start.safetensors"
    shutil.copyfile(folder / "run" / "adapter.safetensors", start)
    with pytest.raises(ConfigError, match="with init_adapter None"):
        adapt(make_settings(folder, max_steps=2, init_adapter=str(start)))
    second = {"run": str(folder / "second"), "init_adapter": str(start)}
    adapt(make_settings(folder, max_steps=1, **second))
    start.rename(folder / "moved.safetensors")
    adapt(make_settings(folder, max_steps=2, **second | {"init_adapter": str(folder / "moved.safetensors")}))
    adapt(make_settings(folder, max_steps=2))
    with pytest.raises(ConfigError, match="with init_adapter of sha256"):
        adapt(make_settings(folder, max_steps=3, **second | {"init_adapter": str(folder / "run/adapter.safetensors")}))
    save_documents(make_documents(LENGTHS[1:], PROMPTS[1:]), folder / "answers")
    with pytest.raises(ConfigError, match="with data of 960 tokens"):
        adapt(make_settings(folder, max_steps=3))


def test_a_run_goes_on_from_the_adapter_that_it_replaces(folder: Path) -> None:
    adapt(make_settings(folder, max_steps=1))
    second = {"run": str(folder / "second"), "init_adapter": str(folder / "converted" / "adapter.safetensors")}
    adapt(make_settings(folder, max_steps=1, **second))
    adapt(make_settings(folder, max_steps=2, **second))
    assert read_log(folder / "second")[-1]["step"] == 2


def test_more_processes_may_go_on_with_fewer_batches_each(folder: Path) -> None:
    adapt(make_settings(folder, max_steps=1, accumulate=2))
    trainer = Trainer(make_settings(folder, accumulate=1))
    for processes, accumulate in ((2, 1), (2, 2), (1, 2)):
        wanted = identity(make_settings(folder, accumulate=accumulate), trainer.documents, processes)
        assert load_checkpoint(folder / "run", trainer.flat, trainer.optimizer, wanted) is not None
    with pytest.raises(ConfigError, match="with accumulate 2"):
        trainer.run()


def test_a_base_of_other_weights_is_another_conversion(folder: Path) -> None:
    adapt(make_settings(folder, max_steps=1))
    save_model(folder / "base", vocab_size=300)
    with pytest.raises(ConfigError, match="bytes of weights"):
        adapt(make_settings(folder, max_steps=1))
