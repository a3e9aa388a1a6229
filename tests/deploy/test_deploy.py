"""deploy/ asks for what the server exports, and for nothing else; its parts agree with each other."""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from linocut.engine.messages import EngineStats
from linocut.server.metric_specs import SPECS

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "linocut.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
# Metrics of Prometheus' own, and labels that it adds to what it scrapes.
OWN, ADDED = {"up", "ALERTS"}, {"instance", "job", "le"}


def exported() -> dict[str, set[str]]:
    """Every series name that a server's /metrics can hold, with its labels."""
    names: dict[str, set[str]] = {}
    for spec in SPECS.values():
        endings = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
        names.update({spec.family + ending: {"model_name", *spec.labels} for ending in endings})
    return names


def asked(expression: str) -> dict[str, set[str]]:
    """Names of the series in a PromQL expression, each with the labels that it is selected by."""
    found: dict[str, set[str]] = {}
    for name, matchers in re.findall(r"\b(linocut_\w+|up|ALERTS)\b(?:\{([^}]*)\})?", expression):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
    return found


def test_the_reader_of_queries_finds_names_and_labels() -> None:
    found = asked('sum by (le) (rate(linocut_a_bucket{x=~"y", z!="{"}[5m])) / on (instance) up > linocut_b')
    assert found == {"linocut_a_bucket": {"x", "z"}, "up": set(), "linocut_b": set()}


@pytest.mark.parametrize(
    ("where", "expression"), QUERIES + [(rule["alert"], rule["expr"]) for rule in ALERTS], ids=lambda text: text[:40]
)
def test_a_query_asks_for_series_that_the_server_exports_by_labels_that_they_have(where: str, expression: str) -> None:
    known = exported()
    found = asked(expression)
    assert found, where
    for name, labels in found.items():
        if name not in OWN:
            assert name in known, f"{where}: {name}"
            assert labels <= known[name] | ADDED, f"{where}: {name}"
    grouped = {
        label.strip()
        for group in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", expression)
        for label in group.split(",")
    }
    assert grouped <= set().union(*known.values()) | ADDED, where


def test_what_the_queries_ask_for_is_known_from_a_real_page() -> None:
    """`exported` is what /metrics shows, read by Prometheus' own parser."""
    from types import SimpleNamespace

    from linocut.server.metrics import Metrics

    metrics = Metrics("m")
    engine = SimpleNamespace(
        model=SimpleNamespace(default_strategy="static"), stats=EngineStats(), in_flight=0, alive=True, silence=0.0
    )
    metrics.watch_engines([engine], "1")
    metrics.answered("/v1/completions", "POST", 200)
    metrics.failed("x")
    metrics.submitted(1, "static", 1, 1)
    metrics.finished("stop", 1, 1, 0.0, 0.0)
    page = text_string_to_metric_families(metrics.render().decode())
    shown = {sample.name: set(sample.labels) - {"le"} for family in page for sample in family.samples}
    assert {name: labels for name, labels in shown.items() if not name.endswith("_created")} == exported()


def test_the_dashboard_is_written_from_its_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEPLOY / "grafana"))
    for name in ("panel", "panels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    written = runpy.run_path(str(DEPLOY / "grafana" / "dashboard.py"))["text"]()
    assert (DEPLOY / "grafana" / "dashboards" / "linocut.json").read_text() == written, (
        "run: python deploy/grafana/dashboard.py"
    )


def test_the_dashboard_has_the_rows_of_a_person_on_call_and_every_panel_explains_itself() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Traffic", "Latency", "Engine", "Cache", "Diffusion"]
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len(set(titles))
    assert all(panel["description"] and panel["targets"] for panel in PANELS)


def test_panels_lie_side_by_side_and_know_no_data_source_but_the_chosen_one() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        mine = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not mine & cells, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine
    sources = {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert sources == {"${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_diffusion_set_is_on_the_dashboard() -> None:
    shown = {name for _, query in QUERIES for name in asked(query)}
    for name in (
        "forwards_total",
        "commits_total",
        "positions_evaluated_total",
        "positions_committed_total",
        "draft_tokens_total",
        "tokens_edited_total",
        "tokens_discarded_total",
        "block_cache_refreshes_total",
        "host_gap_seconds_sum",
        "denoise_steps_per_block_bucket",
        "inter_block_latency_seconds_bucket",
        "tokens_per_forward_bucket",
    ):
        assert f"linocut_{name}" in shown, name


def test_every_alert_is_tested_firing_and_says_how_bad_it_is() -> None:
    cases = [
        case
        for test in yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


@pytest.mark.parametrize(
    "arguments",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]],
    ids=" ".join,
)
def test_promtool_agrees(arguments: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here; Debian has it in the package prometheus")
    done = subprocess.run([promtool, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_service_says_whether_it_is_well_and_drops_what_it_does_not_need() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["restart"] == "unless-stopped", name


def test_both_profiles_build_a_target_of_the_dockerfile_and_answer_to_the_name_that_prometheus_asks() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", (DEPLOY.parent / "Dockerfile").read_text(), re.MULTILINE))
    servers = {name: service for name, service in COMPOSE["services"].items() if service.get("profiles")}
    assert {profile for service in servers.values() for profile in service["profiles"]} == {"cpu", "gpu"}
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (source,) = job["dns_sd_configs"]
    for service in servers.values():
        assert service["build"]["target"] in targets
        assert service["networks"]["default"]["aliases"] == source["names"] == [job["job_name"]]
        assert service["ports"][0].endswith(f":{source['port']}")


def test_secrets_come_from_the_environment_and_the_example_names_every_variable() -> None:
    text = (DEPLOY / "docker-compose.yml").read_text()
    example = (DEPLOY / ".env.example").read_text()
    for variable in re.findall(r"\$\{(\w+)", text):
        assert variable in example or variable in ("GRAFANA_USER", "GRAFANA_PORT", "PROMETHEUS_PORT"), variable
    for variable in ("LINOCUT_API_KEY", "GRAFANA_PASSWORD"):
        assert f"${{{variable}:?" in text, "a missing secret stops the start"
        assert re.search(rf"^{variable}=$", example, re.MULTILINE)


def manifests() -> list[dict[str, Any]]:
    folder = DEPLOY / "kubernetes"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [document for name in names for document in yaml.safe_load_all((folder / name).read_text())]


def test_kubernetes_probes_are_routes_of_the_server_and_the_autoscaler_reads_a_metric_of_it() -> None:
    from linocut.server.operations import PROBES

    found = {document["kind"]: document for document in manifests()}
    assert found.keys() == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in PROBES
    (metric,) = found["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == SPECS["num_requests_waiting"].family
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())
    assert [rule["name"]["as"] for rule in adapter["rules"]["custom"]] == [metric["pods"]["metric"]["name"]]


def test_nothing_is_killed_while_it_drains() -> None:
    from linocut.server.settings import ServerSettings

    draining = ServerSettings(served_names=("m",)).shutdown_seconds
    (deployment,) = (document for document in manifests() if document["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= draining + 15
    for service in COMPOSE["services"].values():
        if service.get("profiles"):
            assert int(service["stop_grace_period"].rstrip("s")) >= draining + 15


@pytest.mark.parametrize(("kind", "check"), [("haproxy", ["-c", "-f"]), ("nginx", ["-t", "-q", "-c"])])
def test_balancers_read_their_configuration(
    kind: str, check: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which(kind, path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip(f"no {kind} here; Debian has it in the package of that name")
    monkeypatch.syspath_prepend(str(DEPLOY))
    from prove_balancer import balancer_file

    file = balancer_file(kind, tmp_path, ["127.0.0.1:8001", "127.0.0.1:8002"])
    done = subprocess.run([program, *check, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_balancers_send_to_the_same_servers_and_hide_their_metrics() -> None:
    for name in ("haproxy.cfg", "nginx.conf"):
        text = (DEPLOY / "balancer" / name).read_text()
        assert re.findall(r"^ *server .*?(linocut-\d:\d+)", text, re.MULTILINE) == ["linocut-1:8000", "linocut-2:8000"]
        assert "/metrics" in text
