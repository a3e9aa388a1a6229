"""The life of a server: bind, load, announce, serve, drain, end with an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import uvicorn

from linocut.engine.errors import ConfigError

from .app import create_app
from .auth import KeyRing
from .engine_launch import Launch
from .replicas import Replicas
from .service import Service
from .settings import ServerSettings
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

_DEATH_SECONDS = 1.0  # from the last engine's death to our exit: errors reach their clients, probes see the 503
_FLUSH_SECONDS = 5
_REFRESH_SECONDS = 1.0  # between looks at the file of API keys


class Lifecycle:
    """One server from start to exit. `announce` is called with the service and its URL when it takes requests.

    launches: of its engines. configuration: the engines', for /server_info.
    """

    def __init__(
        self,
        settings: ServerSettings,
        launches: Sequence[Launch],
        load_tokenizer: Callable[[], Tokenizer | None],
        announce: Callable[[Service, str], None],
        configuration: Mapping[str, object] | None = None,
    ) -> None:
        self._settings = settings
        self._configuration = configuration or {}
        self._engine = Replicas(launches, settings.stall_seconds)
        self._load_tokenizer = load_tokenizer
        self._announce = announce
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._keys: KeyRing | None = None

    def stop(self) -> None:
        """Drain and exit; a second call exits without waiting for requests that run."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    def reload(self) -> None:
        """Read the file of API keys again."""
        if self._keys is not None:
            self._keys.refresh(force=True)

    async def run(self) -> int:
        """Serve until stopped (exit code 0) or no engine is left (1). Raises LinocutError if it cannot start."""
        keys = self._keys = KeyRing(self._settings.api_keys, self._settings.api_key_file)
        listener = _bind(self._settings.host, self._settings.port)
        with self._signals(), contextlib.closing(listener):
            try:
                service = await self._start(keys)
                return 0 if service is None else await self._serve(service, listener)
            finally:
                await self._engine.close()

    async def _start(self, keys: KeyRing) -> Service | None:
        """The service with its model loaded; None if we were stopped meanwhile."""
        log.info("loading the model")
        # Side by side: the tokenizer is ready long before the weights are.
        loading = asyncio.ensure_future(asyncio.gather(asyncio.to_thread(self._load_tokenizer), self._engine.start()))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                return None
            tokenizer, _ = loading.result()
        finally:
            await _cancel(loading, stopping)
        return Service(self._settings, self._engine, tokenizer, keys, self._configuration)

    async def _serve(self, service: Service, listener: socket.socket) -> int:
        config = uvicorn.Config(
            create_app(service),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        server = _Uvicorn(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        stopping, dying = asyncio.ensure_future(self._stop.wait()), asyncio.ensure_future(self._engine.dead.wait())
        refreshing = asyncio.ensure_future(_refresh(service.keys))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            self._announce(service, _url(self._settings.host, listener))
            await asyncio.wait((serving, stopping, dying), return_when=asyncio.FIRST_COMPLETED)
            if not dying.done():
                await self._drain(service, dying)
            else:
                await asyncio.sleep(_DEATH_SECONDS)
            # Before the listener's shutdown: what still runs gets an error event and ends.
            died = self._engine.dead.is_set()
            await self._engine.close()
            server.should_exit = True
            await serving
        finally:
            await _cancel(serving, stopping, dying, refreshing)
            service.close()
        return 1 if died else 0

    async def _drain(self, service: Service, dying: asyncio.Future[Any]) -> None:
        """Say that we leave, then refuse new work; return when all that runs has ended, or at the deadline."""
        service.leaving = True
        hurrying = asyncio.ensure_future(self._hurry.wait())
        try:
            if self._settings.drain_seconds:
                log.info("not ready any more; refusing requests in %g s", self._settings.drain_seconds)
                timeout = self._settings.drain_seconds
                await asyncio.wait((hurrying, dying), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            service.draining = True
            log.info("shutting down; %d requests are running", service.active)
            async with asyncio.timeout(self._settings.shutdown_seconds):
                while service.active and not hurrying.done() and not dying.done():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("%d requests did not end within the deadline", service.active)
        finally:
            await _cancel(hurrying)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGINT: self.stop, signal.SIGTERM: self.stop, signal.SIGHUP: self.reload}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the lifecycle's: uvicorn would raise them again on its way out, and spoil the exit code."""
        yield


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port is known before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _url(host: str, listener: socket.socket) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listener.getsockname()[1]}"


async def _refresh(keys: KeyRing) -> None:
    while True:
        await asyncio.sleep(_REFRESH_SECONDS)
        keys.refresh()


async def _cancel(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
