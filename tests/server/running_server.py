"""A real server (uvicorn on a loopback port) in a thread, in front of a fake engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import httpx
import openai
from fake_engine import FakeEngine

from linocut.server.engine_launch import Launch
from linocut.server.lifecycle import Lifecycle
from linocut.server.service import Service
from linocut.server.settings import ServerSettings
from linocut.server.tokenizer import Tokenizer


class RunningServer:
    """A context manager; `exit_code` is set once the server has ended. launches: of several engines."""

    def __init__(
        self, engine: FakeEngine, tokenizer: Tokenizer | None, launches: Sequence[Launch] = (), **settings: Any
    ) -> None:
        self.engine = engine
        self._launches = launches or [Launch(engine.launch)]
        self.exit_code: int | None = None
        self.error: BaseException | None = None
        self._tokenizer = tokenizer
        self._settings = ServerSettings(**{"served_names": ("fake", "alias"), "port": 0, **settings})
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def main() -> int:
            self._loop = asyncio.get_running_loop()
            self.lifecycle = Lifecycle(self._settings, self._launches, lambda: self._tokenizer, self._announce)
            return await self.lifecycle.run()

        try:
            self.exit_code = asyncio.run(main())
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    def _announce(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self._ready.set()

    def __enter__(self) -> RunningServer:
        self._thread.start()
        assert self._ready.wait(10)
        if self.error is not None:
            raise self.error
        key = self._settings.api_keys[0] if self._settings.api_keys else "none"
        self.http = httpx.Client(base_url=self.url, timeout=10)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()
        self.stop()
        self.join()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.lifecycle.stop)

    def join(self, seconds: float = 15.0) -> int | None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the server does not end"
        return self.exit_code
