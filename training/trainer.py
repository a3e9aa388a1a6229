"""The training loop: batches, updates, schedule, checkpoints."""

from __future__ import annotations

import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from linocut.engine.errors import ConfigError
from linocut.engine.loading import read_config

from .adapter import save_adapter
from .backbone import load_decoder
from .checkpoint import Progress, identity, load_checkpoint, save_checkpoint
from .documents import Documents, Epochs, gather_rows, load_documents, split_held_out
from .export import ADAPTER_FILE, converted_config, export
from .flat import FlatParameters
from .flops import attention_flops, batch_flops
from .held_out import HeldOut
from .journal import Journal
from .loss import LossWeights
from .network import Batch, Counts, Network, count_weights, make_batch
from .processes import Processes
from .schedule import learning_rate_share
from .segments import Noise, draw_noise, draw_segments
from .settings import AdaptSettings
from .tally import Tally
from .trainables import initial_tensors

_QUEUED_STEPS = 2  # updates the host may run ahead of the device


class Trainer:
    """One process of a run. `documents` replaces reading settings.data (tests, measurements)."""

    def __init__(self, settings: AdaptSettings, documents: Documents | None = None) -> None:
        self.settings = s = settings
        self.born = time.monotonic()
        base = Path(s.base)
        config, _ = read_config(base)
        converted_config(s, config)  # refuses a layout that does not fit before any work
        self.processes = Processes(s.device)
        self.device = self.processes.device
        cuda = self.device.type == "cuda"
        s.dtype = s.dtype or ("bfloat16" if cuda else "float32")
        s.compile = cuda if s.compile is None else s.compile
        dtype: torch.dtype = getattr(torch, s.dtype)
        if cuda:
            torch.set_float32_matmul_precision("high")
        self.decoder = load_decoder(base, dtype, self.device)
        self.flat = FlatParameters(initial_tensors(s, self.decoder), dtype, self.device)
        self.network = Network(s, self.decoder, self.flat.tensors, flex=cuda, compiled=s.compile)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(s.beta1, s.beta2), eps=1e-8, fused=cuda)
        documents = documents or load_documents([Path(folder) for folder in s.data], s.length)
        train, held_out = split_held_out(documents, s.held_out, seed=0)
        if not len(train):
            raise ConfigError("there are no documents to train on")
        self.documents = documents.to(self.device)
        self.epochs = Epochs(documents, train, s.length, s.seed, self.device)
        self.held_out = HeldOut(s, self.documents, held_out, self.processes)
        self.weights = LossWeights(s.ce, s.kl, s.tv, s.certainty, s.certainty_temperature)
        self.tally = Tally(self.device)
        self.progress = Progress()
        self._conversion = identity(s, documents, self.processes.world)
        self._loss = torch.zeros((), device=self.device)
        self._norms = torch.zeros(len(self.flat.parameters), device=self.device)
        self.flops = batch_flops(s, self.decoder)

    def _groups(self) -> list[dict[str, Any]]:
        rates = {"main": self.settings.learning_rate, "draft": self.settings.draft_learning_rate}
        decay = self.settings.weight_decay
        return [
            {"params": [parameter], "lr": rates[group], "peak": rates[group], "weight_decay": decay}
            for group, parameter in self.flat.parameters.items()
        ]

    # ---- one update

    def make_batches(self, noise: Noise) -> tuple[list[Batch], int]:
        """This process's micro-batches of the next update, and the clean tokens of all processes' ones.

        Micro-batch j of process r is number j · world + r of the update: how many processes share the work changes
        neither the data nor the noise.
        """
        s, world = self.settings, self.processes.world
        count = s.rows * s.accumulate * world
        numbers, self.progress.epoch, self.progress.cursor = self.epochs.take(
            self.progress.epoch, self.progress.cursor, count
        )
        batches = []
        for j in range(s.accumulate):
            index = j * world + self.processes.rank
            generator = torch.Generator(self.device)
            generator.manual_seed(hash((s.seed, self.progress.step, index)) & (2**62 - 1))
            rows = gather_rows(self.documents, numbers[index * s.rows : (index + 1) * s.rows], s.length)
            segments = draw_segments(rows, noise, s, generator, s.offset_decay)
            batches.append(make_batch(s, rows, segments, noise.length, noise.partial, generator))
        return batches, self.epochs.tokens

    def update(self, rate: float) -> int:
        """One optimiser step with the learning rates at `rate` of their peaks. Returns the clean tokens used."""
        noise = draw_noise(self.settings, self.progress.step)
        batches, tokens = self.make_batches(noise)
        self.accumulate(batches)
        self._norms = self.flat.clip(self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.step()
        self.flat.publish()
        self.progress.step += 1
        self.progress.tokens += tokens
        return tokens

    def accumulate(self, batches: list[Batch]) -> None:
        """The gradient of an update in `flat.gradient`, summed over micro-batches and processes."""
        sums = self.processes.add(count_weights(batches, self.device)).clamp(min=1.0)
        counts = Counts(sums[0], sums[1])
        self.flat.gradient.zero_()
        for batch in batches:
            output = self.network.forward(batch, counts, self.weights)
            output.loss.backward()
            self.flat.gather()
            self.tally.add_batch(batch, output, self.settings.context)
            self._loss += output.loss.detach()
        self.processes.add(self.flat.gradient)

    # ---- evaluation

    def evaluate(self) -> dict[str, Any]:
        """Losses and accuracies on the held-out documents, as for a record of the log."""
        return self.held_out.evaluate(self.network, self.weights)

    # ---- the run

    def share_done(self, seconds: float) -> float:
        """How much of the run is done, 0 to 1: the furthest of its limits."""
        s, p = self.settings, self.progress
        done = [0.0]
        if s.max_seconds is not None:
            done.append(seconds / s.max_seconds)
        if s.max_steps is not None:
            done.append(p.step / s.max_steps)
        if s.max_tokens is not None:
            done.append(p.tokens / s.max_tokens)
        return min(1.0, max(done))

    def run(self) -> Path:
        s, leads = self.settings, self.processes.leads
        folder = Path(s.run)
        if leads:
            folder.mkdir(parents=True, exist_ok=True)
        self.processes.wait()
        found = load_checkpoint(folder, self.flat, self.optimizer, self._conversion)
        self.progress = found or self.progress
        journal = Journal(folder / "log.jsonl", leads)
        terminated: list[int] = []

        def end(number: int, frame: object) -> None:
            if terminated and number == signal.SIGINT:  # asked twice: at once
                raise KeyboardInterrupt
            terminated.append(number)

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if leads:
                s.save(folder / "settings.json")
            finished = self._loop(journal, folder, terminated)
            self.progress.finished = finished
            if leads:  # before anything that takes time: whoever ended this process may not wait for it
                self._save(folder)
            record = {"step": self.progress.step, **self.evaluate()}
            journal.write("held-out", {**self._place(), **record})
            if leads:
                export(s, self.flat.masters())
            journal.write("end", {**self._place(), "finished": finished})
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            journal.close()
        self.processes.wait()
        self.processes.close()
        return Path(s.output)

    def _loop(self, journal: Journal, folder: Path, terminated: list[int]) -> bool:
        """Update until a limit. Returns whether the run (and not only this process's time) is over."""
        s, leads = self.settings, self.processes.leads
        if leads:
            journal.write("start", {**self._place(), "world": self.processes.world, "device": self.device.type})
        journal.write("held-out", {**self._place(), **self.evaluate()})
        stored = self.progress.seconds
        started: float | None = None  # compilation is over: the clock of the schedule runs
        checkpointed = evaluated = time.monotonic()
        queued: deque[torch.cuda.Event] = deque()
        logged = (time.monotonic(), self.progress.tokens, self.progress.step)
        self.tally.clear()
        while True:
            now = time.monotonic()
            seconds = stored + (now - started if started is not None else 0.0)
            early = bool(terminated) or (s.session_seconds is not None and now - self.born > s.session_seconds)
            share, seconds, stop, save, look = self.processes.share(
                [
                    self.share_done(seconds),
                    seconds,
                    float(early),
                    float(now - checkpointed > s.checkpoint_seconds),
                    float(now - evaluated > s.evaluate_seconds),
                ]
            )
            self.progress.seconds = seconds
            if share >= 1.0 or stop:
                return share >= 1.0
            if save:
                if leads:
                    self._save(folder)
                checkpointed = time.monotonic()
            if look:
                journal.write("held-out", {**self._place(), **self.evaluate()})
                evaluated = time.monotonic()
            self.update(learning_rate_share(share, s.warm_up, s.final_share))
            if self.device.type == "cuda":
                queued.append(torch.cuda.Event())
                queued[-1].record()
                if len(queued) > _QUEUED_STEPS:
                    queued.popleft().synchronize()
            if started is None:
                self._synchronize()
                started = time.monotonic()
                checkpointed = evaluated = started
                logged = (started, self.progress.tokens, self.progress.step)
                self.tally.clear()
                self._loss.zero_()
            elif self.progress.step % s.log_every == 0:
                logged = self._log(journal, share, logged)

    def _log(self, journal: Journal, share: float, since: tuple[float, int, int]) -> tuple[float, int, int]:
        """Write a record of the updates since the last one. Reads the leading process's own rows."""
        self._synchronize()
        now, s, p = time.monotonic(), self.settings, self.progress
        elapsed, steps = now - since[0], max(1, p.step - since[2])
        flops = self.flops * s.accumulate * steps + attention_flops(
            self.decoder, *self.tally.pairs(), s.mode == "gated"
        )
        record = {
            **self._place(),
            "lr": float(f"{self.optimizer.param_groups[0]['lr']:.4g}"),
            "loss": round(float(self._loss) * self.processes.world / steps, 4),
            "grad_norms": [round(v, 4) for v in self._norms.tolist()],
            **self.tally.read(),
            "tokens_per_second": round((p.tokens - since[1]) / elapsed),
            "mfu": round(flops / elapsed / (s.peak_tflops * 1e12), 4),
        }
        journal.write("train", record)
        journal.advance(share, record)
        self.tally.clear()
        self._loss.zero_()
        return (now, p.tokens, p.step)

    def _place(self) -> dict[str, Any]:
        p = self.progress
        return {"step": p.step, "seconds": round(p.seconds, 1), "tokens": p.tokens, "epoch": p.epoch}

    def _save(self, folder: Path) -> None:
        """Checkpoint, and the adapter alone, which is small enough to carry elsewhere."""
        save_checkpoint(folder, self.flat, self.optimizer, self.progress, self._conversion)
        if self.settings.mode != "full":
            dtype = torch.bfloat16 if self.settings.dtype == "bfloat16" else torch.float32
            save_adapter(self.flat.masters(), self.settings.scale, folder / ADAPTER_FILE, dtype)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
