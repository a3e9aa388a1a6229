"""Where the engine process begins: a module of its own, so that the server process never imports the engine (torch)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from linocut.engine.config import EngineConfig
from linocut.engine.errors import LinocutError

from .logs import LogSettings

log = logging.getLogger("linocut.engine")


def run(config: EngineConfig, logs: LogSettings, input_endpoint: str, output_endpoint: str) -> None:
    """An engine that is a process of the server's host."""
    with _settled(logs):
        from linocut.engine.process import run_engine

        run_engine(config, input_endpoint, output_endpoint)


def run_placed(config: EngineConfig, logs: LogSettings, input_endpoint: str, output_endpoint: str) -> None:
    """An engine that is a Ray actor, as are its further ranks."""
    with _settled(logs):
        from linocut.engine.parallel.placed import RayCrew
        from linocut.engine.process import EngineProcess

        log.info("loading the model")
        EngineProcess(config, input_endpoint, output_endpoint, RayCrew).run()


@contextmanager
def _settled(logs: LogSettings) -> Iterator[None]:
    logs.apply()
    try:
        yield
    except LinocutError:  # reported to the server as Fatal, which says it in one line; a traceback would bury it
        sys.exit(1)
