"""Where the engine process begins: a module of its own, so that the server process never imports the engine (torch)."""

from __future__ import annotations

import sys

from linocut.engine.config import EngineConfig
from linocut.engine.errors import LinocutError

from .logs import LogSettings


def run(config: EngineConfig, logs: LogSettings, input_endpoint: str, output_endpoint: str) -> None:
    logs.apply()
    from linocut.engine.process import run_engine

    try:
        run_engine(config, input_endpoint, output_endpoint)
    except LinocutError:  # reported to the server as Fatal, which says it in one line; a traceback would bury it
        sys.exit(1)
