"""What the endpoints share: the engine, the tokenizer, the settings, and whether new work is welcome."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import Request

from .api_errors import NotFound, Unavailable, clip
from .auth import KeyRing
from .body import read_object
from .generation import Generation, Job
from .metrics import Metrics
from .prompts import PromptBuilder
from .replicas import Replicas
from .settings import ServerSettings
from .tokenizer import Tokenizer
from .tracing import NoTracer, OtlpTracer, Tracer
from .unsupported import UnknownFields
from .version import package_version

LOGGED_BODY = 16384  # characters


class NoText:
    """Stands for the tokenizer of a model that has none: answers have token ids only."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return ""


class Service:
    """The state of one server.

    leaving: set when it wants to be sent no more work; draining: when it no longer takes any.
    configuration: the engine's, as the operator gave it.
    """

    def __init__(
        self,
        settings: ServerSettings,
        engine: Replicas,
        tokenizer: Tokenizer | None,
        keys: KeyRing,
        configuration: Mapping[str, object],
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.tokenizer = tokenizer
        self.model = engine.model
        if tokenizer is not None:
            tokenizer.guard(self.model)
        # A canvas can be filled from nothing.
        needs_prompt = self.model.context != "canvas"
        self.prompts = PromptBuilder(tokenizer, self.model.vocab_size, self.model.mask_id, needs_prompt=needs_prompt)
        self.metrics = Metrics(settings.served_names[0])
        self.metrics.watch_engines(engine.engines, package_version())
        self.keys = keys
        endpoint, name = settings.otlp_endpoint, settings.served_names[0]
        self.tracer: Tracer = NoTracer() if endpoint is None else OtlpTracer(endpoint, name)
        self.unknown_fields = UnknownFields()
        self.created = int(time.time())
        self.started = time.monotonic()
        self.configuration = configuration
        self.leaving = False
        self.draining = False
        self.active = 0  # HTTP calls under way, probes apart

    @property
    def chats(self) -> bool:
        """Whether the model is one for conversations. Canvas models are not, whatever their tokenizer says."""
        return self.model.context != "canvas"

    @property
    def ready(self) -> bool:
        return self.engine.alive and not self.leaving

    def close(self) -> None:
        self.prompts.close()
        self.tracer.close()

    async def read(self, request: Request) -> dict[str, Any]:
        content = await read_object(request, self.settings.max_body_bytes, self.settings.body_seconds)
        if self.settings.log_prompts:
            notes = request.scope.setdefault("linocut.notes", {})
            notes["body"] = json.dumps(content)[:LOGGED_BODY]
        return content

    def resolve_model(self, name: str | None) -> str:
        """The served name a request goes by. Raises 404."""
        if name is None:
            return self.settings.served_names[0]
        if name not in self.settings.served_names:
            raise NotFound(f"The model `{clip(name)}` does not exist.", param="model", code="model_not_found")
        return name

    def check_accepting(self) -> None:
        """Raise 503 unless new work is welcome."""
        if self.draining:
            headers = {"Retry-After": str(self.settings.retry_after_seconds)}
            raise Unavailable("the server is shutting down", code="shutting_down", headers=headers)
        if not self.engine.alive:
            raise Unavailable("the inference engine is not running", code="engine_dead")

    def generate(self, job: Job) -> Generation:
        decoder = NoText() if self.tokenizer is None else self.tokenizer
        return Generation(job, self.engine, decoder, self.metrics, self.settings.retry_after_seconds)


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
