"""Stage 4: what a conversion writes, how fast and how well, against the model it came from."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from linocut.engine.config import EngineConfig
from linocut.engine.errors import ConfigError
from linocut.engine.loading import read_config
from linocut.engine.machine import choose_device, choose_dtype
from linocut.engine.models.backbone import backbone_from_config

from .evaluate_runs import Question, Report, Run, RunFile, read_runs, release, run_settings
from .evaluate_settings import Setting, complete
from .evaluate_table import make_row, markdown
from .judge import Judge
from .plots import plot_speed_quality
from .tasks import Prompt, Scorer, read_prompts, shuffled

RESULT, TABLE, ANSWERS, CURVE = "evaluation.json", "evaluation.md", "answers.jsonl", "speed_quality.svg"


@dataclass(frozen=True)
class Options:
    """What a result depends on besides the models. limit: prompts of each file for the table; task_limit: of each
    scored file for its score, the table's among them."""

    max_tokens: int = 128
    limit: int = 48
    task_limit: int = 0
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    max_running: int | None = None


@dataclass
class _Chosen:
    """The prompts of a run, and which of each file they are."""

    table: list[Prompt]
    more: list[Prompt]
    files: dict[str, dict[str, Any]]
    ids: dict[str, list[int]]

    def questions(self, prompts: Sequence[Prompt]) -> list[Question]:
        return [Question(prompt.id, self.ids[prompt.id]) for prompt in prompts]


def evaluate(
    model_folder: Path,
    original_folder: Path,
    prompts: Sequence[Path],
    *,
    out: Path,
    max_tokens: int = 128,
    settings: Sequence[Setting | str] | None = None,
    limit: int = 48,
    task_limit: int = 0,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    max_running: int | None = None,
    execute_code: bool = True,
    report: Report = print,
) -> dict[str, Any]:
    """Decode held-out prompts with every setting, and compare with the original's autoregressive text.

    Writes evaluation.json (returned), evaluation.md, answers.jsonl and, with matplotlib, speed_quality.svg to `out`; a
    run that was stopped goes on from its answers. settings: `Setting`s or strings (`evaluate_settings.parse`); None is
    the table of a model card. Settings that the folder does not support are skipped, and named in "skipped". dtype: of
    the engine; in half precision near ties fall differently in forwards of different sizes, so that few long texts of
    two strategies stay identical. execute_code: run the Python that the models write for MBPP (`sandbox.py`).
    Raises ConfigError or ModelError.
    """
    options = Options(max_tokens, limit, task_limit, seed, dtype, device, max_running)
    rows = complete(settings)
    chosen = _choose(model_folder, original_folder, prompts, options)
    folders = {"original": original_folder, "converted": model_folder}
    out.mkdir(parents=True, exist_ok=True)
    file = RunFile(out / ANSWERS, _fingerprint(folders, chosen, options))
    file.start()
    runs = file.read()
    skipped = _generate(rows, runs, folders, chosen, options, file, report)

    # Only now, so that the engine had the device for itself.
    report("judging the answers")
    config = _engine_config(original_folder, options)
    judge = Judge(original_folder, choose_device(config))
    scorer = _scorer(execute_code)
    everything = [*chosen.table, *chosen.more]
    result: dict[str, Any] = {
        "model": model_folder.name,
        "original": original_folder.name,
        "options": asdict(options),
        "machine": machine(config, original_folder),
        "prompts": chosen.files,
        "skipped": skipped,
        "rows": [],
    }
    for setting in rows:
        run = runs.get(setting.label)
        if run is not None:
            answers = run.answers
            verdicts = judge.verdicts([(tuple(chosen.ids[a.id]), tuple(a.tokens)) for a in answers])
            scores = scorer.score(everything, [a.text for a in [*answers, *run.more]])
            result["rows"].append(make_row(setting, run, verdicts, runs, scores))
    del judge
    release()
    return _write(result, scorer, out)


def rescore(out: Path, prompts: Sequence[Path], *, execute_code: bool = True) -> dict[str, Any]:
    """Score the answers of a finished evaluation again, on any machine; everything else stays as it was measured.

    For a GPU machine that lacks the IFEval checkers. Raises ConfigError if `out` holds no evaluation of `prompts`.
    """
    scorer = _scorer(execute_code)
    try:
        result: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out} holds no evaluation: {error}") from None
    known = {prompt.id: prompt for path in prompts for prompt in read_prompts(path)}
    runs: dict[str, Run] = {run.setting: run for _, run in read_runs(out / ANSWERS)}
    for row in result["rows"]:
        if row["label"] not in runs:
            raise ConfigError(f"{out / ANSWERS} has no answers of {row['label']}")
        answers = [*runs[row["label"]].answers, *runs[row["label"]].more]
        if missing := [answer.id for answer in answers if answer.id not in known]:
            raise ConfigError(f"the prompt files lack {missing[0]} and {len(missing) - 1} other prompts of {out}")
        row["scores"] = scorer.score([known[answer.id] for answer in answers], [answer.text for answer in answers])
    return _write(result, scorer, out)


def machine(config: EngineConfig, folder: Path) -> dict[str, str]:
    """What the speeds were measured on, in words."""
    device = choose_device(config)
    dtype = str(choose_dtype(config, backbone_from_config(read_config(folder)[0]), device)).removeprefix("torch.")
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads"
    )
    return {"name": name, "device": device.type, "dtype": dtype, "torch": torch.__version__}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _engine_config(folder: Path, options: Options) -> EngineConfig:
    return EngineConfig(model=str(folder), device=options.device, dtype=options.dtype)  # type: ignore[arg-type]


def _scorer(execute_code: bool) -> Scorer:
    # A text such as "no" would count as true, and run what it was meant to stop.
    if not isinstance(execute_code, bool):
        raise ConfigError(f"execute_code is true or false, not {execute_code!r}")
    return Scorer(execute_code=execute_code, workers=min(os.cpu_count() or 1, 16))


def _choose(model_folder: Path, original_folder: Path, files: Sequence[Path], options: Options) -> _Chosen:
    """Prompts whose text and answer fit both models, encoded with the converted model's tokenizer and template."""
    tokenizer = _tokenizer(model_folder)
    longest = min(int(read_config(f)[0].get("max_position_embeddings", 4096)) for f in (model_folder, original_folder))
    room = longest - options.max_tokens
    chosen = _Chosen([], [], {}, {})
    if not files:
        raise ConfigError("an evaluation needs at least one file of prompts")
    for path in files:
        known = read_prompts(path)
        scored = options.task_limit if known and known[0].task != "chat" else 0
        wanted = max(options.limit, scored)
        fitting: list[Prompt] = []
        for prompt in shuffled(known, options.seed):
            if len(fitting) < wanted and len(ids := encode(tokenizer, prompt.text)) <= room:
                fitting.append(prompt)
                chosen.ids[prompt.id] = ids
        # The table's prompts come first: a run that scores more of them keeps its table.
        table, more = fitting[: options.limit], fitting[options.limit :]
        name = path.name.split(".")[0]
        if not table:
            raise ConfigError(f"{path} holds no prompt that fits the model")
        if name in chosen.files:
            raise ConfigError(f"two files of prompts are named {name}")
        chosen.files[name] = {
            "count": len(table),
            "task": known[0].task,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "ids": [p.id for p in table],
            "more_ids": [p.id for p in more],
        }
        chosen.table += table
        chosen.more += more
    return chosen


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a user turn with the generation prompt behind it; of the text itself where there is no template."""
    if not tokenizer.chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def _fingerprint(folders: dict[str, Path], chosen: _Chosen, options: Options) -> str:
    """Of all that answers depend on, weights by size and time: answers of other ones must not be taken over."""
    files = [path for folder in folders.values() for path in sorted(folder.glob("*")) if path.name != "README.md"]
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    told = json.dumps([asdict(options), weights, [p.id for p in [*chosen.table, *chosen.more]], chosen.ids])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _generate(
    rows: Sequence[Setting],
    runs: dict[str, Run],
    folders: dict[str, Path],
    chosen: _Chosen,
    options: Options,
    file: RunFile,
    report: Report,
) -> list[str]:
    """Answer what is missing in `runs`, one engine for each model and block size."""
    longest = max(len(ids) for ids in chosen.ids.values()) + options.max_tokens
    # Every row prefills its prompts itself: a shared prefix would be counted for whoever comes first.
    config = {"prefix_caching": False, "max_model_len": longest, "device": options.device, "dtype": options.dtype}
    if options.max_running is not None:
        config["max_running"] = options.max_running

    def done(run: Run) -> None:
        runs[run.setting] = run
        file.add(run)

    skipped = []
    for key in dict.fromkeys((setting.model, setting.block_size) for setting in rows):
        group = [s for s in rows if (s.model, s.block_size) == key and s.label not in runs]
        if group:
            table, more = chosen.questions(chosen.table), chosen.questions(chosen.more)
            failed = run_settings(
                folders[key[0]],
                group,
                table,
                more,
                _tokenizer(folders["converted"]),
                max_tokens=options.max_tokens,
                config=config,
                done=done,
                report=report,
            )
            skipped += failed
            for line in failed:
                report(line)
            release()
    return skipped


def _write(result: dict[str, Any], scorer: Scorer, out: Path) -> dict[str, Any]:
    result["notes"] = scorer.notes
    (out / RESULT).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / TABLE).write_text(markdown(result), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        plot_speed_quality(result, out / CURVE)
    return result
