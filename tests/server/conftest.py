from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, Script, say, silence
from running_server import RunningServer
from small_tokenizer import write_folder

from linocut.server.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    loaded = load_tokenizer(folder)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    """One server for a module's tests; each sets the engine's script through `script`."""
    with RunningServer(FakeEngine(), tokenizer, keep_alive_seconds=0.2) as server:
        yield server


@pytest.fixture
def server(shared: RunningServer) -> RunningServer:
    shared.engine.script = silence
    shared.engine.adds.clear()
    shared.engine.aborts.clear()
    return shared


@pytest.fixture
def ids(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return encode


@pytest.fixture
def answering(ids: Callable[[str], list[int]]) -> Callable[..., Script]:
    """A script whose answers are a text."""

    def script(text: str, chunk: int = 3, after: float = 0.0) -> Script:
        return say(ids(text), chunk, after)

    return script
