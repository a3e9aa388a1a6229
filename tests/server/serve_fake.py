"""`linocut serve` with the fake engine in the engine's process: run as a program by test_lifecycle.py."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import fake_engine

from linocut.engine.config import EngineConfig
from linocut.engine.errors import ModelError
from linocut.server import cli, engine_entry
from linocut.server.logs import LogSettings


def run_fake(config: EngineConfig, logs: LogSettings, input_endpoint: str, output_endpoint: str) -> None:
    print(f"engine pid {os.getpid()} omp {os.environ.get('OMP_WAIT_POLICY')}", file=sys.stderr, flush=True)
    if config.threads == 99:
        raise SystemExit(3)
    logging.getLogger("linocut.engine").info("loaded")
    tokens = [300 + i % 10 for i in range(300)]
    after = 0.02
    engine = fake_engine.FakeEngine(fake_engine.say(tokens, chunk=1, after=after))
    fake_engine.run_script(engine, input_endpoint, output_endpoint)


engine_entry.run = run_fake


def resolve(name: str | None) -> Path:
    if name == "missing":
        raise ModelError("missing is neither an existing folder nor a Hugging Face id like 'org/name'")
    return Path(str(name))


if __name__ == "__main__":
    from linocut.engine.models import source

    source.resolve_model = resolve
    cli.main()
