"""The engine's last statistics as Prometheus metrics, read when they are scraped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from linocut.engine.histogram import Distribution
from linocut.engine.messages import EngineStats, ModelInfo

from .metric_specs import ENGINE_SPECS, SPECS, EngineSpec


class Engine(Protocol):
    """What is exported of `EngineClient`. silence: seconds since the engine's last message."""

    model: ModelInfo
    stats: EngineStats
    in_flight: int

    @property
    def alive(self) -> bool: ...
    @property
    def silence(self) -> float: ...


class EngineCollector(Collector):
    """Of one engine; nothing is kept between scrapes."""

    def __init__(self, engine: Engine, model_name: str, version: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self._version = version

    def collect(self) -> Iterable[Metric]:
        engine, stats, model = self._engine, self._engine.stats, self._engine.model
        used = stats.pages_total - stats.pages_free - stats.pages_cached
        yield self._gauge("engine_up", float(engine.alive))
        yield self._gauge("engine_silence_seconds", engine.silence)
        yield self._gauge("choices_in_flight", engine.in_flight)
        yield self._gauge("kv_cache_usage_perc", used / max(stats.pages_total, 1))
        told = {"strategy": model.default_strategy, "version": self._version}
        for name in ("model_info", "cache_config_info"):
            labels = {label: str(told.get(label, getattr(model, label, ""))) for label in SPECS[name].labels}
            yield self._gauge(name, 1.0, labels)
        for spec in ENGINE_SPECS:
            yield self._family(spec, spec.read(stats))

    def _gauge(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
        labels = labels or {}
        gauge = GaugeMetricFamily(SPECS[name].family, SPECS[name].text, labels=["model_name", *labels])
        gauge.add_metric([self._model_name, *labels.values()], value)
        return gauge

    def _family(self, spec: EngineSpec, value: float | Mapping[str, float] | Distribution) -> Metric:
        names = ["model_name", *spec.labels]
        if isinstance(value, Distribution):
            histogram = HistogramMetricFamily(spec.family, spec.text, labels=names)
            counts = value.counts or [0] * (len(spec.buckets) + 1)
            bounds = [*(f"{bound:g}" for bound in spec.buckets), "+Inf"]
            cumulative = list(zip(bounds, accumulate(counts), strict=True))
            histogram.add_metric([self._model_name], cumulative, value.total)
            return histogram
        kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
        family = kind(spec.family, spec.text, labels=names)
        for labels, number in value.items() if isinstance(value, Mapping) else [((), value)]:
            family.add_metric([self._model_name, *([labels] if labels else [])], number)
        return family
