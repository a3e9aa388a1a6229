"""The autoregressive peer: vLLM with greedy decoding, on the same card in the same sitting.

    python -m loadtests.performance.vllm_peer FOLDER [--shape qwen2.5-7b] [--model FOLDER --name NAME]
        [--batches 1,16,64,256] [--clients 1,64,16,256]

Writes FOLDER/vllm-NAME.json beside the sheets of `python -m loadtests.performance`. A shape has random weights, whose
values greedy decoding does not mind while the ends of texts are ignored. With --model and FOLDER/prompts.ids, which the
task `embedded` leaves there, it answers the same prompts from the original's weights, too. Needs vLLM; the rest of
Linocut's dependencies are not imported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from linocut.engine.bench.shapes import write_shape

from .sheet import Row, Sheet

PROMPT, ANSWER = 512, 256
# What `linocut` takes for the end of a text of the embedded model.
STOPS = [0, 2]


class Peer:
    """vLLM's engine, driven request by request, so that clients can ask again as soon as they are answered."""

    def __init__(self, folder: Path, random_weights: bool, most: int) -> None:
        vllm = importlib.import_module("vllm")
        self.version = vllm.__version__
        self._params = vllm.SamplingParams
        self._tokens = importlib.import_module("vllm.inputs").tokens_input
        self._kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        self._llm = vllm.LLM(
            model=str(folder),
            load_format="dummy" if random_weights else "auto",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2048,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=False,
            max_num_seqs=most,
            disable_log_stats=True,
        )
        self._count = 0

    def run(
        self, prompts: list[list[int]], clients: int, requests: int, tokens: int, ends: bool, stream: bool = True
    ) -> Row:
        """`requests` prompts in turns, at most `clients` at a time, each for `tokens` tokens; with `ends`, or to its
        end. Seconds from the first request to the last answer; to the first token: of each, and of the last one.
        Without `stream` an answer comes as a whole."""
        engine = self._llm.llm_engine
        kind = self._kinds.DELTA if stream else self._kinds.FINAL_ONLY
        asked: dict[str, float] = {}
        firsts: dict[str, float] = {}
        running = total = 0
        began = time.perf_counter()
        while running or len(asked) < requests:
            while running < clients and len(asked) < requests:
                self._count += 1
                prompt = prompts[len(asked) % len(prompts)]
                stops = {"stop_token_ids": STOPS} if ends else {}
                params = self._params(
                    temperature=0.0, max_tokens=tokens, ignore_eos=not ends, detokenize=False, output_kind=kind, **stops
                )
                name = f"r{self._count}"
                asked[name] = time.perf_counter()
                engine.add_request(name, self._tokens(prompt), params)
                running += 1
            for output in engine.step():
                made = len(output.outputs[0].token_ids)
                if made:
                    firsts.setdefault(output.request_id, time.perf_counter())
                total += made
                running -= bool(output.finished)
        now = time.perf_counter()
        waited = [firsts[name] - asked[name] for name in asked]
        return {
            "requests": requests,
            "tokens": total,
            "seconds": now - began,
            "tokens_per_second": total / (now - began),
            "first_token_s": statistics.mean(waited) if not ends else statistics.median(waited),
            "all_first_s": max(firsts.values()) - began,
        }


def measure(peer: Peer, sheet: Sheet, batches: list[int], clients: list[int], chat: Row | None) -> None:
    """Decoding at each batch, prefill of 1 and 64 prompts, and chats where there are any."""
    draw = random.Random(0)
    prompts = [[draw.randrange(100, 40000) for _ in range(PROMPT)] for _ in range(max(64, *batches))]
    for count in (1, 64):

        def prefill(count: int = count) -> Row:
            runs = [peer.run(prompts, count, count, 1, False) for _ in range(7)][2:]
            seconds = statistics.median(run["all_first_s"] for run in runs)
            first = statistics.median(run["first_token_s"] for run in runs)
            speed = count * PROMPT / seconds
            return {"prompt": PROMPT, "first_token_s": first, "seconds": seconds, "tokens_per_second": speed}

        sheet.attempt(prefill, point="prefill", asked=count)
    for count in batches:

        def decode(count: int = count) -> Row:
            peer.run(prompts, count, count, 8, False)
            start, whole = (
                min(peer.run(prompts, count, count, tokens, False, stream=False)["seconds"] for _ in range(2))
                for tokens in (1, ANSWER)
            )
            step = (whole - start) / (ANSWER - 1)
            return {"prompt": PROMPT, "answer": ANSWER, "step_ms": step * 1e3, "tokens_per_second": count / step}

        sheet.attempt(decode, point="decode", asked=count)
    for count in clients if chat is not None else ():

        def answer(count: int = count) -> Row:
            requests = 8 if count == 1 else 3 * count
            peer.run(chat["ids"], count, requests, chat["tokens"] // 4, True)
            return peer.run(chat["ids"], count, requests, chat["tokens"], True)

        sheet.attempt(answer, point="clients", asked=count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.performance.vllm_peer", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", help="of linocut's shapes, with random weights")
    parser.add_argument("--model", type=Path, help="a folder of weights")
    parser.add_argument("--name", help="of the sheet; default: the shape's, or the folder's")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--clients", default="1,64,16,256")
    arguments = parser.parse_args()
    if (arguments.shape is None) == (arguments.model is None):
        parser.error("name a --shape or a --model")
    batches, clients = ([int(part) for part in text.split(",")] for text in (arguments.batches, arguments.clients))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    ids = arguments.folder / "prompts.ids"
    chat = json.loads(ids.read_text()) if arguments.model is not None and ids.exists() else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or write_shape(arguments.shape, Path(scratch))
        began = time.perf_counter()
        peer = Peer(folder, arguments.model is None, max(*batches, *clients))
        name = arguments.name or arguments.shape or folder.name
        head = {"task": name, "engine": f"vLLM {peer.version}", "shape": arguments.shape}
        head["start_s"] = round(time.perf_counter() - began, 1)
        sheet = Sheet(arguments.folder / f"vllm-{name}.json", head)
        measure(peer, sheet, batches, clients, chat)
        sheet.note(finished=True)


if __name__ == "__main__":
    main()
