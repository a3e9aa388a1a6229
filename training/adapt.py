"""The adapt stage: train what turns an autoregressive model into one that also decodes in parallel.

    python -m linocut.training.adapt settings.json
    torchrun --nproc-per-node 2 -m linocut.training.adapt settings.json

The same command resumes an interrupted run. Every process works on its own rows; the gradient is one flat buffer that
is summed between them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from linocut.engine.errors import LinocutError

from .processes import end_process
from .settings import AdaptSettings, load_settings


def adapt(settings: AdaptSettings) -> Path:
    """Train (or resume), export and return the converted folder.

    Also exports when `session_seconds` or a SIGTERM ends the process early: the folder then holds the weights so far,
    and log.jsonl's last record says "finished": false. Raises ConfigError or ModelError.
    """
    from .trainer import Trainer

    return Trainer(settings).run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="linocut.training.adapt", description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="JSON file of AdaptSettings")
    try:
        adapt(load_settings(parser.parse_args().settings))
    except LinocutError as error:
        sys.exit(f"error: {error}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_process(0)


if __name__ == "__main__":
    main()
