"""The server's own configuration (the engine has `EngineConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linocut.engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """served_names: what clients may write as `model`; the first is the one we answer with.

    api_keys, api_key_file: Bearer keys; neither means open. Times are in seconds.
    replicas: engines behind this server. distributed: "ray", or None for engines on this host; ray_address: of which
    cluster (see `RayCluster`). otlp_endpoint: where traces go, the base URL of a collector; None: nowhere.
    log_prompts: whether log lines of requests hold their bodies, prompts included.
    drain_seconds: from SIGTERM or SIGINT on, how long /ready says 503 before new requests are refused, so that load
    balancers notice first. shutdown_seconds: how long running requests may take to finish from then on.
    stall_seconds: after which an engine that has work and makes no step counts as hung.
    max_choices: upper bound of `n`. max_prompts: upper bound of the prompts of one completion request.
    """

    served_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    distributed: str | None = None
    ray_address: str | None = None
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    log_prompts: bool = False
    log_format: str = "text"
    otlp_endpoint: str | None = None
    max_body_bytes: int = 8 << 20
    body_seconds: float = 60.0
    keep_alive_seconds: float = 15.0
    drain_seconds: float = 0.0
    shutdown_seconds: float = 30.0
    stall_seconds: float = 60.0
    retry_after_seconds: int = 2
    max_choices: int = 128
    max_prompts: int = 1024

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise ConfigError(what)

        require(bool(self.served_names) and all(self.served_names), "a served model name must not be empty")
        require(0 <= self.port <= 65535, "port must be between 0 and 65535")
        require(1 <= self.replicas <= 64, "replicas must be between 1 and 64")
        require(self.distributed in (None, "ray"), f"--distributed {self.distributed!r}: ray is all there is")
        require(not self.ray_address or self.distributed == "ray", "--ray-address needs --distributed ray")
        sane_keys = all(key and key.isascii() and key.isprintable() for key in self.api_keys)
        require(sane_keys, "API keys must be printable ASCII")
        require(self.max_body_bytes >= 1024, "max_body_bytes must be at least 1024")
        require(self.keep_alive_seconds > 0, "keep_alive_seconds must be positive")
        require(self.drain_seconds >= 0, "drain_seconds must not be negative")
        require(self.shutdown_seconds >= 0, "shutdown_seconds must not be negative")
        require(self.stall_seconds > 0, "stall_seconds must be positive")
