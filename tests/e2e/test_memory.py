"""A real shortage of memory: the engine's address space is bounded while it serves."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loadtests.serving import Served, served
from loadtests.shape_model import write_shape_model

CLIENTS = 40
# A position's logits over a vocabulary of 152,064 take 0.6 MB: those of some rows fit together, of all of them do not.
# How many come together is the machine's affair, so there is less and less room until some do not fit.
ROOMS = 140 << 20, 110 << 20, 80 << 20, 50 << 20
OPTIONS = (
    "--random-weights",
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--kv-memory",
    "32M",
    "--threads",
    "1",
    "--max-running",
    "64",
)


def ask(server: Served) -> list[tuple[int, Any]]:
    """The status of each client's answer, and its ids or the error."""

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            body = {"max_tokens": 12, "ignore_eos": True, "temperature": 0.0, "return_token_ids": True}
            prompts = [[300 + i] * (20 + i) for i in range(CLIENTS)]
            calls = (client.post("/v1/completions", json={**body, "prompt": prompt}) for prompt in prompts)
            return await asyncio.gather(*calls)

    answers = [(one.status_code, one.json()) for one in asyncio.run(all_of_them())]
    return [(status, a["choices"][0]["token_ids"] if status == 200 else a["error"]["message"]) for status, a in answers]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds another process by Linux's prlimit")
def test_an_engine_that_runs_out_of_memory_serves_what_fits_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is freed is given back at once, so that only what is large runs out of room.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    shape = write_shape_model("fast-dllm-v2-7b", tmp_path / "shape", tiny=True)
    with served(None, str(shape), *OPTIONS, "--log-level", "warning") as server:
        assert server.process is not None
        whole = ask(server)
        assert {status for status, _ in whole} == {200}
        processes = psutil.Process(server.process.pid).children()
        engine = next(one for one in processes if "spawn_main" in " ".join(one.cmdline()))
        idle = engine.memory_info().vms
        for room in ROOMS:
            engine.rlimit(psutil.RLIMIT_AS, (idle + room, psutil.RLIM_INFINITY))
            for (status, found), (_, expected) in zip(ask(server), whole, strict=True):
                assert (status, found) == (200, expected)
            if server.metrics()["linocut_forwards_out_of_memory_total"]:
                break
        else:
            pytest.fail("there was always room")
        assert server.leftovers() == ""
        engine.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        assert ask(server) == whole
