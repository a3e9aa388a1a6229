"""The polish stage: rounds of rolling the converted model out in block mode and training on what it wrote.

The states that a block decoder meets are its own: its context is text it committed in parallel, not the original's. So
each round lets the model write, then trains it there: KL to the frozen original's distribution on that text
(on-policy distillation), and certainty forcing, which sharpens rows that are right already, so that more of them pass
the threshold (dParallel, arXiv 2509.26488, section 3). A share of the original's own answers is replayed.

A round's folder in `run`: rollouts/ and replay/ (answers), train/ (checkpoint and log), model/ (its result, kept while
the next round needs it), round.json when it is complete. The same command goes on where an earlier one ended.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from linocut.engine.errors import ConfigError, ModelError
from linocut.engine.loading import read_config

from .adapt import adapt
from .adapter import DRAFT_PREFIX
from .answers import Answer, read_answers, scan_answers, shard_path, shard_paths, write_shard
from .export import ADAPTER_FILE
from .generate import SUMMARY, generate, read_summary
from .generate_settings import GenerateSettings
from .launch import count_gpus, launch
from .polish_settings import PolishSettings
from .prompts import expand
from .settings import AdaptSettings, load_settings, settings_from_dict

__all__ = ["PolishSettings", "polish"]

_DONE = "round.json"
# Fields of AdaptSettings that say what the model is, and so are no choice of this stage.
_SHAPE = ("mode", "layout", "context", "logit_source", "block_size", "mask_token_id", "banned_ids", "rank", "scale")


def polish(settings: PolishSettings) -> Path:
    """Polish (or go on), write the polished folder and return it. Raises ConfigError or ModelError."""
    return _Polish(settings).run()


class _Polish:
    def __init__(self, settings: PolishSettings) -> None:
        self.settings = settings
        self.work = Path(settings.run or "")
        self.shape, self.adapter = _read_shape(settings)
        self.block = settings.block_size or int(self.shape["block_size"])
        if {Path(settings.output).resolve()} & {Path(settings.model).resolve(), Path(settings.base).resolve()}:
            raise ConfigError("the output folder is one of the folders that polish reads")
        self._train_settings(0, self.adapter)  # refuses options that do not fit before any work

    def run(self) -> Path:
        s = self.settings
        self.work.mkdir(parents=True, exist_ok=True)
        self._log("start", settings=asdict(s))
        model, adapter = Path(s.model), self.adapter
        for number in range(s.rounds):
            folder = self._folder(number)
            if not (folder / _DONE).is_file():
                self._round(number, model, adapter)
            model, adapter = folder / "model", folder / "train" / ADAPTER_FILE
        output = Path(s.output)
        _copy_model(model, output)
        self._log("end", rounds=s.rounds, output=str(output))
        return output

    def _round(self, number: int, model: Path, adapter: Path) -> None:
        folder, began = self._folder(number), time.monotonic()
        record: dict[str, Any] = {"rollouts": self._roll_out(number, model), "replay": self._replay(number)}
        self._log("rollouts", round=number, **record)
        record |= {"train": self._train(number, adapter), "seconds": round(time.monotonic() - began, 1)}
        self._log("round", round=number, **record)
        part = folder / f"{_DONE}.partial"
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        part.replace(folder / _DONE)
        if number > 0:
            shutil.rmtree(self._folder(number - 1) / "model", ignore_errors=True)

    # ---- text

    def _roll_out(self, number: int, model: Path) -> dict[str, Any]:
        """Let the model answer prompts in block mode. Returns counts, with tokens per forward of finished answers."""
        s, out = self.settings, self._folder(number) / "rollouts"
        if read_summary(out) is None:
            wanted = GenerateSettings(
                model=model,
                out=out,
                prompts=tuple(expand(s.prompts)),
                prompts_of=tuple(Path(folder) for folder in s.data),
                exclude=tuple(Path(path) for path in s.exclude),
                limit=s.rollouts,
                max_tokens=s.max_tokens,
                prompt_limit=s.prompt_limit,
                temperature=s.temperature or 1.0,
                sampled_share=1.0 if s.temperature > 0 else 0.0,
                truncated_share=s.truncated_share,
                max_seconds=None if s.seconds is None else s.seconds * s.rollout_share,
                seed=s.seed * 1_000_003 + number,
                devices=s.devices,
                processes=s.processes,
                engine={**s.engine, "block_size": self.block},
                diffusion=s.diffusion,
                progress=s.progress,
            )
            if generate(wanted).ended == "stopped":
                raise ConfigError(f"polish was stopped in round {number}: run the same command again to go on")
        summary = read_summary(out) or {}
        if not summary.get("answers"):
            (out / SUMMARY).unlink(missing_ok=True)  # a later call tries again
            if summary.get("ended") == "seconds":
                raise ConfigError("the time to roll out was over before an answer: allow more time, or fewer rounds")
            raise ModelError(f"no roll-out of round {number} was worth keeping: {summary.get('counts')}")
        counts = summary["counts"]
        forwards = counts.get("finished forwards", 0)
        speed = round(counts.get("finished tokens", 0) / forwards, 3) if forwards else None
        return {**summary, "tokens_per_forward": speed}

    def _replay(self, number: int) -> dict[str, int]:
        """Draw the original's answers that are to be `share` of the round's tokens."""
        s, folder = self.settings, self._folder(number) / "replay"
        if not s.data or s.share == 0:
            return {"answers": 0}
        if not shard_paths(folder):
            rollouts = len(read_answers(self._folder(number) / "rollouts").tokens)
            wanted, drawn, tokens = rollouts * s.share / (1 - s.share), [], 0
            sources = [read_answers(Path(data)) for data in s.data]
            places = [(source, document) for source in sources for document in range(len(source))]
            starts = {id(source): source.starts for source in sources}
            for place in np.random.default_rng((s.seed, number)).permutation(len(places)).tolist():
                source, document = places[place]
                begin, length = int(starts[id(source)][document]), int(source.lengths[document])
                prompt = begin + int(source.prompt_lengths[document])
                ids = source.tokens
                drawn.append(Answer(place, ids[begin:prompt].tolist(), ids[prompt : begin + length].tolist(), True))
                tokens += length
                if tokens >= wanted:
                    break
            write_shard(shard_path(folder, 0), drawn, [], {"model": Path(s.base).name})
        done = scan_answers(folder)
        return {"answers": done.answers, "answer_tokens": done.answer_tokens}

    # ---- training

    def _train_settings(self, number: int, adapter: Path) -> AdaptSettings:
        s, folder = self.settings, self._folder(number)
        replays = bool(s.data) and s.share > 0
        values = {
            **self.shape,
            "base": s.base,
            "data": [str(folder / name) for name in ("rollouts", *(["replay"] if replays else []))],
            "run": str(folder / "train"),
            "output": str(folder / "model"),
            "init_adapter": str(adapter),
            "segments": s.segments or [self.block],
            "ce": s.ce,
            "kl": s.kl,
            "certainty": s.certainty,
            "partial": s.partial,
            "learning_rate": s.learning_rate,
            "draft_learning_rate": s.learning_rate,
            "max_steps": s.steps,
            "max_seconds": None if s.seconds is None else s.seconds * (1 - s.rollout_share),
            "seed": s.seed * 1_000_003 + number + 1,
        }
        if fixed := sorted(s.train.keys() & (values.keys() - {"draft_learning_rate"})):
            raise ConfigError(f"not for train: {', '.join(fixed)} (options of polish itself, or given by the model)")
        return settings_from_dict(values | s.train)

    def _train(self, number: int, adapter: Path) -> dict[str, Any]:
        """Train on the round's text. Returns the held-out records of its beginning and end."""
        settings = self._train_settings(number, adapter)
        _adapt(settings, self.settings.devices)
        lines = (Path(settings.run) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        if not records[-1].get("finished"):
            raise ConfigError(f"polish was stopped in round {number}: run the same command again to go on")
        held_out = [record for record in records if record["kind"] == "held-out"]
        return {"first": held_out[0], "last": held_out[-1]}

    # ---- files

    def _folder(self, number: int) -> Path:
        return self.work / f"round-{number:03d}"

    def _log(self, kind: str, **fields: Any) -> None:
        with (self.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **fields}) + "\n")
        if self.settings.progress and kind in ("rollouts", "end"):
            brief = {name: value for name, value in fields.items() if name in ("round", "output")}
            speed = fields.get("rollouts", {}).get("tokens_per_forward")
            print(f"polish: {kind} {brief}", *([f"tokens per forward {speed}"] if speed else []), file=sys.stderr)


def _read_shape(settings: PolishSettings) -> tuple[dict[str, Any], Path]:
    """What the model is, as fields of AdaptSettings, and the adapter to go on with. Raises ConfigError."""
    config, _ = read_config(Path(settings.model))
    own = config.get("linocut") or {}
    shape: dict[str, Any]
    if own.get("adapter") is not None:
        adapter = Path(settings.adapter or Path(settings.model) / ADAPTER_FILE)
        names = ("context", "logit_source", "block_size", "mask_token_id", "banned_ids")
        shape = {name: own[name] for name in names} | {"mode": "gated", "rank": own["adapter"]["rank"]}
    else:
        if settings.adapter is None:
            raise ConfigError("this model's adapter is merged: name it with adapter (a model trained whole has none)")
        adapter = Path(settings.adapter)
        trained = load_settings(adapter.with_name("settings.json"))
        shape = {name: getattr(trained, name) for name in _SHAPE}
    try:
        with safe_open(adapter, "np") as file:
            shape["draft_head"] = any(name.startswith(DRAFT_PREFIX) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{adapter} cannot be read as an adapter: {error}") from None
    return shape, adapter


def _adapt(settings: AdaptSettings, devices: int | None) -> None:
    """Run the adapt stage: on GPUs in processes of their own, which leave the memory to the next roll-out."""
    if count := count_gpus(settings, devices):
        launch(settings, count)
    else:
        adapt(settings)


def _copy_model(model: Path, output: Path) -> None:
    """Copy the folder; config.json, which makes it a model, comes last."""
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(model.iterdir(), key=lambda path: path.name == "config.json"):
        part = output / f"{path.name}.partial"
        shutil.copyfile(path, part)
        part.replace(output / path.name)
