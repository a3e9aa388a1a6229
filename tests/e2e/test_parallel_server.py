"""A server whose model two processes hold, asked by the real openai client; and what it does when one of them dies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil

from .conftest import GOLDEN, start
from .test_families import cases, complete


def test_it_says_what_the_family_s_own_code_says_and_ends_with_a_lost_rank(tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--device", "cpu", "--mask-id", "311", "--max-model-len", "2048"]
    server = start([str(GOLDEN / "llada"), *options, "--tensor-parallel-size", "2"], tmp_path / "log")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    for case in cases("llada"):
        params = case["params"]
        diffusion = {
            "strategy": "threshold",
            "threshold": params["threshold"],
            "block_length": params["block_length"],
            "cache": "none",
        }
        assert complete(client, case["prompt"], len(case["output"]), diffusion=diffusion) == case["output"]

    family = psutil.Process(server.process.pid).children(recursive=True)
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": [5, 6, 7], "max_tokens": 1500, "ignore_eos": True}
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        server.wait_for("linocut_num_requests_running == 1")
        ranks = sorted(family, key=lambda child: child.memory_info().rss)[-2:]
        (member,) = [child for child in ranks if child.parent() in ranks]
        member.kill()
        killed = time.monotonic()
        assert answer.result().status_code in (500, 503)
    assert server.process.wait(timeout=30) == 1
    assert time.monotonic() - killed < 30
    assert psutil.wait_procs(family, timeout=10)[1] == []
