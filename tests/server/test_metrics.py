"""What /metrics shows: every metric of the specifications, every statistic of the engine, and docs/metrics.md."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from fake_engine import FakeEngine, model_info, say
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer

from linocut.engine.counters import COMMIT_REASONS, ENDINGS, FORWARD_KINDS
from linocut.engine.histogram import BOUNDS, Distribution, Histogram
from linocut.engine.messages import EngineStats
from linocut.server.api_errors import InternalError, Unavailable
from linocut.server.metric_specs import SPECS, Spec
from linocut.server.metric_table import metric_table
from linocut.server.metrics import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
USER = [{"role": "user", "content": "Hello"}]


def render(stats: EngineStats) -> str:
    metrics = Metrics("m")
    engine = SimpleNamespace(model=model_info(), stats=stats, in_flight=0, alive=True, silence=0.0)
    metrics.watch_engines([engine], "1.2.3")
    return metrics.render().decode()


def values(text: str) -> dict[str, float]:
    return {
        sample.name
        + "".join(
            f",{k}={v}" for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine")
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def changed(stats: EngineStats, name: str) -> object:
    """Another value of one statistic."""
    value = getattr(stats, name)
    if isinstance(value, Distribution):
        return Distribution([1, *[0] * len(BOUNDS[name])], 0.5)
    if isinstance(value, dict):
        known = {"forwards_by_kind": FORWARD_KINDS, "commits_by_reason": COMMIT_REASONS, "discarded_by_ending": ENDINGS}
        return {known[name][-1]: 7}
    return value + 7


@pytest.mark.parametrize("name", [field.name for field in msgspec.structs.fields(EngineStats)])
def test_every_engine_statistic_is_exported(name: str) -> None:
    stats = EngineStats()
    assert values(render(msgspec.structs.replace(stats, **{name: changed(stats, name)}))) != values(render(stats))


def test_the_page_is_written_from_the_code() -> None:
    assert PAGE.read_text() == metric_table(), "run: linocut metrics > docs/metrics.md"


def test_a_histogram_counts_each_value_in_the_bucket_of_the_first_bound_not_below_it() -> None:
    histogram = Histogram("steps_per_block")
    for value in (1, 2, 2, 7, 1000):
        histogram.observe(value)
    found = values(render(EngineStats(steps_per_block=histogram.snapshot())))
    buckets = {
        le: found[f"linocut_denoise_steps_per_block_bucket,le={le}"] for le in ("1", "2", "6", "8", "256", "+Inf")
    }
    assert buckets == {"1": 1, "2": 3, "6": 3, "8": 4, "256": 4, "+Inf": 5}
    assert found["linocut_denoise_steps_per_block_sum"] == 1012
    assert found["linocut_denoise_steps_per_block_count"] == 5


def test_a_server_that_has_met_everything_shows_every_metric_with_its_labels_and_no_other(tokenizer, ids) -> None:
    engine = FakeEngine(say(ids("Hello there"), chunk=1), info=model_info(max_running=1, max_queued=1))
    with RunningServer(engine, tokenizer) as server:
        answered = server.http.post("/v1/chat/completions", json={"messages": USER, "n": 2})
        assert answered.status_code == 200
        server.service.metrics.failed("EngineDead")
        families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    found = {family.name + ("_total" if family.type == "counter" else ""): family for family in families}
    created = {name for name in found if name.endswith("_created")}
    assert found.keys() - created == {spec.family for spec in SPECS.values()}
    for spec in SPECS.values():
        family = found[spec.family]
        assert (family.type, family.documentation) == (spec.kind, spec.text)
        assert labels_of(spec, family) == {"model_name", *spec.labels}, spec.name


def labels_of(spec: Spec, family) -> set[str]:
    (names,) = {frozenset(sample.labels) - {"le"} for sample in family.samples}
    return set(names)


def test_the_times_of_a_choice_are_the_engines_until_its_first_tokens_and_the_servers_from_there(
    tokenizer, ids
) -> None:
    engine = FakeEngine(say(ids("Hello there"), chunk=1, after=0.02))
    with RunningServer(engine, tokenizer) as server:
        server.http.post("/v1/chat/completions", json={"messages": USER, "diffusion": {"strategy": "static"}})
        found = values(server.http.get("/metrics").text)
    assert found["linocut_request_queue_time_seconds_sum"] == pytest.approx(0.25)
    assert found["linocut_request_prefill_time_seconds_sum"] == pytest.approx(0.5)
    decoding = found["linocut_request_decode_time_seconds_sum"]
    assert decoding > 0
    assert math.isclose(found["linocut_request_inference_time_seconds_sum"], decoding + 0.5)
    tokens = len(ids("Hello there")) + 1
    assert math.isclose(found["linocut_request_time_per_output_token_seconds_sum"], decoding / (tokens - 1))
    assert found["linocut_strategy_requests_total,strategy=static"] == 1
    assert found["linocut_prompt_tokens_cached_total"] == 4


def test_what_alerts_and_panels_take_the_rate_of_is_there_before_it_first_happens() -> None:
    found = values(render(EngineStats()))
    call = "linocut_http_requests_total,endpoint=/v1/chat/completions,method=POST"
    names = [f"{call},status={status}" for status in (200, 400, 499, 500, 503)]
    names += [f"linocut_request_success_total,finished_reason={reason}" for reason in ("stop", "length")]
    names += [f"linocut_request_failures_total,reason={kind.type}" for kind in (InternalError, Unavailable)]
    assert {name: found[name] for name in names} == dict.fromkeys(names, 0)
