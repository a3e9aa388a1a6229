"""The requests of one HTTP call at their engines: what is still open, and outputs not yet taken."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from linocut.engine.errors import EngineDead
from linocut.engine.messages import AddRequest, ChoiceOutput

if TYPE_CHECKING:
    from .engine_client import EngineClient

Key = tuple[str, int]  # (request id, choice)


class Submission:
    """Made by `Replicas.submit`. Used as a context manager it aborts on exit whatever is still open.

    clients: where each request is, by its id.
    """

    def __init__(self, requests: list[AddRequest], clients: Mapping[str, EngineClient]) -> None:
        self._clients = clients
        self.open: set[Key] = {(request.request_id, choice) for request in requests for choice in range(request.n)}
        self._outputs: list[ChoiceOutput] = []
        self._failure: EngineDead | None = None
        self._changed = asyncio.Event()

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def take(self, timeout: float | None = None) -> list[ChoiceOutput]:
        """All outputs that have arrived, waiting for one if there is none; empty after `timeout` seconds.

        Raises EngineDead once an engine of it is gone and what had been sent has been taken.
        """
        if not self._outputs and self._failure is None:
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
            except TimeoutError:
                return []
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            return outputs
        assert self._failure is not None
        raise self._failure

    def abort_choice(self, request_id: str, choice: int) -> None:
        """End one choice early (its answer is complete without more tokens)."""
        if (request_id, choice) in self.open:
            self._clients[request_id].abort(self, request_id, choice)

    def close(self) -> None:
        """Abort what is open. Calling it again does nothing."""
        for request_id in {key[0] for key in self.open}:
            self._clients[request_id].abort(self, request_id)
        for request_id, client in self._clients.items():
            client.forget(request_id)

    def deliver(self, output: ChoiceOutput) -> bool:
        """Called by the client; False if the choice is closed (its output crossed our abort)."""
        key = (output.request_id, output.choice)
        if key not in self.open:
            return False
        if output.finish_reason is not None:
            self.open.discard(key)
        self._outputs.append(output)
        self._changed.set()
        return True

    def fail(self, request_id: str, error: EngineDead) -> None:
        """Called by the client: the request's engine is gone."""
        self.open = {key for key in self.open if key[0] != request_id}
        self._failure = error
        self._changed.set()
