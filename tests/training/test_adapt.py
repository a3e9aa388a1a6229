"""The adapt stage as a whole: it learns, resumes, continues, and shares its work between processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import make_folder, make_settings, read_log, save_documents, save_model
from torch import Tensor

from linocut.engine.errors import ConfigError
from linocut.training.adapt import adapt
from linocut.training.documents import Documents
from linocut.training.schedule import learning_rate_share
from linocut.training.segments import Noise
from linocut.training.settings import load_settings, settings_from_dict
from linocut.training.trainer import Trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def masters(folder: Path, name: str) -> Tensor:
    return load_file(folder / name / "checkpoint.safetensors")["master"]


@pytest.mark.parametrize("mode", ["gated", "lora", "full"])
def test_a_resumed_run_ends_with_the_parameters_of_an_uninterrupted_one(folder: Path, mode: str) -> None:
    changes = {"mode": mode, "draft_head": True, "max_steps": 4}
    adapt(make_settings(folder, run=str(folder / "whole"), **changes))

    class Killed(Exception):
        pass

    trainer = Trainer(make_settings(folder, run=str(folder / "parts"), checkpoint_seconds=-1.0, **changes))
    update = trainer.update

    def die_at_third(rate: float) -> int:
        if trainer.progress.step == 2:
            raise Killed
        return update(rate)

    trainer.update = die_at_third  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    adapt(make_settings(folder, run=str(folder / "parts"), **changes))
    torch.testing.assert_close(masters(folder, "parts"), masters(folder, "whole"), atol=0, rtol=0)


def test_a_session_that_runs_out_of_time_leaves_a_checkpoint_and_a_folder(folder: Path) -> None:
    adapt(make_settings(folder, session_seconds=0.0, max_steps=100))
    assert (folder / "converted" / "adapter.safetensors").exists()
    assert (folder / "run" / "adapter.safetensors").exists()
    assert read_log(folder / "run")[-1]["finished"] is False
    adapt(make_settings(folder, max_steps=2))
    assert read_log(folder / "run")[-1]["finished"] is True


def test_a_run_starts_from_a_shipped_adapter(folder: Path) -> None:
    adapt(make_settings(folder, draft_head=True))
    shipped = folder / "converted" / "adapter.safetensors"
    trainer = Trainer(make_settings(folder, init_adapter=str(shipped), run=str(folder / "second")))
    for name, tensor in load_file(shipped).items():
        if name.startswith("draft_head."):
            continue
        factor = trainer.settings.scale if name.endswith(".up") else 1.0
        torch.testing.assert_close(trainer.flat.masters()[name] * factor, tensor)
    with pytest.raises(ConfigError, match="init_adapter"):
        Trainer(make_settings(folder, init_adapter=str(shipped), rank=4))


def test_an_export_leaves_nothing_of_an_earlier_one(folder: Path) -> None:
    adapter, weights = folder / "converted" / "adapter.safetensors", folder / "converted" / "model.safetensors"
    adapt(make_settings(folder, max_steps=1))
    assert adapter.exists()
    adapt(make_settings(folder, mode="lora", max_steps=2, run=str(folder / "merged")))
    assert not adapter.exists()
    original = (folder / "base" / "model.safetensors").read_bytes()
    # Merged weights of the very size of the original's.
    merged = original[:-64] + bytes(64)
    weights.write_bytes(merged)
    adapt(make_settings(folder, max_steps=1))
    assert weights.read_bytes() == original


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_a_folder(folder: Path, number: int) -> None:
    trainer = Trainer(make_settings(folder, max_steps=100))
    update, before = trainer.update, signal.getsignal(number)

    def update_and_signal(rate: float) -> int:
        if trainer.progress.step == 1:
            os.kill(os.getpid(), number)
        return update(rate)

    trainer.update = update_and_signal  # type: ignore[method-assign]
    trainer.run()
    assert signal.getsignal(number) is before
    last = read_log(folder / "run")[-1]
    assert (last["finished"], last["step"]) == (False, 2)
    assert (folder / "run" / "checkpoint.safetensors").exists()
    assert (folder / "converted" / "config.json").exists()


def test_the_last_evaluation_comes_after_the_checkpoint(folder: Path) -> None:
    trainer = Trainer(make_settings(folder, max_steps=2))
    evaluate = trainer.evaluate

    def die_at_the_end() -> dict:
        if trainer.progress.step == 2:
            raise MemoryError
        return evaluate()

    trainer.evaluate = die_at_the_end  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        trainer.run()
    with safe_open(folder / "run" / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 2


def test_the_log_tells_losses_accuracies_and_speed(folder: Path) -> None:
    adapt(make_settings(folder, partial=0.0))
    records = read_log(folder / "run")
    assert [r["kind"] for r in records] == ["start", "held-out", "train", "train", "train", "held-out", "end"]
    train = records[2]
    assert {"step", "seconds", "tokens", "lr", "loss", "draft_ce", "draft_accuracy", "tokens_per_second", "mfu"} <= set(
        train
    )


def test_limits_and_options_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="limit"):
        make_settings(folder, max_steps=None)
    with pytest.raises(ConfigError, match="no such option"):
        settings_from_dict({"learning": 1})
    with pytest.raises(ConfigError, match="token-causal"):
        make_settings(folder, context="block-causal")
    with pytest.raises(ConfigError, match="qwen2 base"):
        adapt(make_settings(folder, mode="full", layout="fast-dllm-v2", context="block-causal"))


def test_settings_survive_their_file(folder: Path) -> None:
    settings = make_settings(folder)
    settings.save(folder / "settings.json")
    assert load_settings(folder / "settings.json") == settings


def test_the_learning_rate_rises_and_falls() -> None:
    assert learning_rate_share(0.0, 0.03, 0.05) == pytest.approx(0.01)
    assert learning_rate_share(0.03, 0.03, 0.05) == pytest.approx(1.0)
    assert learning_rate_share(1.0, 0.03, 0.05) == pytest.approx(0.05)


_WORKER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from linocut.training.processes import end_process
from linocut.training.segments import Noise
from linocut.training.settings import load_settings
from linocut.training.trainer import Trainer

trainer = Trainer(load_settings(Path(sys.argv[1])))
batches, tokens = trainer.make_batches(Noise(4, False))
trainer.accumulate(batches)
if trainer.processes.leads:
    save_file({"gradient": trainer.flat.gradient}, sys.argv[2])
trainer.processes.wait()
trainer.processes.close()
end_process(0)
"""


def test_two_processes_give_the_gradient_of_one_with_both_batches(folder: Path) -> None:
    make_settings(folder).save(folder / "settings.json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(probe.getsockname()[1])
    command = [sys.executable, "-c", _WORKER, str(folder / "settings.json"), str(folder / "gradient.safetensors")]
    workers = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    alone = Trainer(make_settings(folder, accumulate=2))
    batches, _ = alone.make_batches(Noise(4, False))
    alone.accumulate(batches)
    together = load_file(folder / "gradient.safetensors")["gradient"]
    torch.testing.assert_close(together, alone.flat.gradient, atol=1e-6, rtol=1e-4)


def counting_documents(count: int) -> Documents:
    """A language a model can learn without context: a prompt, then numbers that rise by one."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, 100, (count, 1), generator=generator)
    tokens = (starts + torch.arange(32)) % 97 + 3
    sizes = torch.full((count,), 32)
    return Documents(tokens.flatten().int(), sizes.cumsum(0) - sizes, sizes, torch.full((count,), 6))


def test_a_tiny_conversion_learns_to_draft(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    save_documents(counting_documents(400), tmp_path / "answers")
    settings = make_settings(
        tmp_path, rank=32, length=128, rows=4, segments=[4], partial=0.2, max_steps=120, learning_rate=1e-2,
        weight_decay=0.0, held_out=16, log_every=40, draft_head=True, draft_learning_rate=5e-3,
    )  # fmt: skip
    adapt(settings)
    held_out = [r for r in read_log(tmp_path / "run") if r["kind"] == "held-out"]
    first, last = held_out[0], held_out[-1]
    assert max(first["draft_accuracy"]) < 0.1
    assert min(last["draft_accuracy"]) > 0.5
    assert last["accepted"] > first["accepted"] + 1.5
    assert last["draft_ce"] < 0.5 * first["draft_ce"]
