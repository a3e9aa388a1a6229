"""Schemathesis over /openapi.json: whatever its schemas allow or forbid, no 5xx, no hang, and only what is documented.

    python -m loadtests.contract [--examples 100] [--url URL | --model FOLDER] [-- OPTIONS of schemathesis]

Needs the `load` extra. Exits with schemathesis's status.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from .serving import served

_SCHEMATHESIS = "from schemathesis.cli import schemathesis; schemathesis()"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def run_contract(url: str, examples: int, options: list[str]) -> int:
    """Status of `schemathesis run` against the server at `url`."""
    command = [sys.executable, "-c", _SCHEMATHESIS, "run", f"{url}/openapi.json"]
    command += ["--checks", CHECKS, "--max-examples", str(examples), "--request-timeout", "60", "--no-color"]
    # The schema says what a field may be; which fields go together is checked behind it.
    command += ["--continue-on-failure", "--no-shrink", "--generation-database", "none", *options]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.contract", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=100, help="of each operation and phase")
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--model", help="a folder to serve, or `embedded`; default: a tiny model of random weights")
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    options = ("--dtype", "float32", "--max-model-len", "64", "--kv-memory", "4M", "--log-level", "error")
    with served(arguments.url, arguments.model, *options) as server:
        return run_contract(server.url, arguments.examples, arguments.options)


if __name__ == "__main__":
    sys.exit(main())
