"""The engines' last statistics as Prometheus metrics, read when they are scraped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """Of all engines, by their number; nothing is kept between scrapes."""

    def __init__(self, engines: Sequence[Engine], model_name: str, version: str) -> None:
        self._engines = engines
        self._model_name = model_name
        self._version = version

    def collect(self) -> Iterable[Metric]:
        engines = list(self._engines)
        yield self._gauges("engine_up", [({}, float(engine.alive)) for engine in engines])
        yield self._gauges("engine_silence_seconds", [({}, engine.silence) for engine in engines])
        yield self._gauges("choices_in_flight", [({}, engine.in_flight) for engine in engines])
        yield self._gauges("kv_cache_usage_perc", [({}, _usage(engine.stats)) for engine in engines])
        for name in ("model_info", "cache_config_info"):
            yield self._gauges(name, [(self._labels(name, engine.model), 1.0) for engine in engines])
        for spec in ENGINE_SPECS:
            yield self._family(spec, [spec.read(engine.stats) for engine in engines])

    def _labels(self, name: str, model: ModelInfo) -> dict[str, str]:
        told = {"strategy": model.default_strategy, "version": self._version}
        names = [label for label in SPECS[name].labels if label != "engine"]
        return {label: str(told.get(label, getattr(model, label, ""))) for label in names}

    def _gauges(self, name: str, values: list[tuple[dict[str, str], float]]) -> Metric:
        spec = SPECS[name]
        gauge = GaugeMetricFamily(spec.family, spec.text, labels=["model_name", *spec.labels])
        for number, (labels, value) in enumerate(values):
            gauge.add_metric([self._model_name, str(number), *labels.values()], value)
        return gauge

    def _family(self, spec: EngineSpec, values: list[float | Mapping[str, float] | Distribution]) -> Metric:
        names = ["model_name", *spec.labels]
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        family = kinds[spec.kind](spec.family, spec.text, labels=names)
        for number, value in enumerate(values):
            whose = [self._model_name, str(number)]
            if isinstance(value, Distribution):
                counts = value.counts or [0] * (len(spec.buckets) + 1)
                bounds = [*(f"{bound:g}" for bound in spec.buckets), "+Inf"]
                family.add_metric(whose, list(zip(bounds, accumulate(counts), strict=True)), value.total)
            elif isinstance(value, Mapping):
                for label, part in value.items():
                    family.add_metric([*whose, label], part)
            else:
                family.add_metric(whose, value)
        return family


def _usage(stats: EngineStats) -> float:
    return (stats.pages_total - stats.pages_free - stats.pages_cached) / max(stats.pages_total, 1)
