"""The generation benchmark: prompts of a file, strategies of a command line, waves in turns, our own engine in them."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from converted import converted_folder
from tiny_engines import engine, prompt_of

from linocut.engine.bench.chat import conversation, read_chat
from linocut.engine.bench.generation import Ours, Wave, parse_strategies
from linocut.engine.bench.peers import LlamaPeer, _until_stop
from linocut.engine.bench.turns import AUTOREGRESSIVE, take_turns
from linocut.engine.errors import ConfigError, ParameterError


@dataclass
class Fake:
    """Answers with the prompt itself, at a fixed speed, and writes down what it was given."""

    name: str
    seconds: float = 1.0
    forwards: int = 1
    most: int | None = None
    log: list[tuple[str, int]] = field(default_factory=list)

    def run(self, prompts: list[list[int]], tokens: int, ignore_eos: bool) -> Wave:
        self.log.append((self.name, len(prompts)))
        return Wave([p[:tokens] for p in prompts], self.seconds, self.seconds / 2, self.forwards)


class TestConversation:
    @pytest.mark.parametrize(
        "record",
        [
            {"prompt": "hi"},
            {"question": "hi", "answer": "no"},
            {"instruction": "hi", "output": "no"},
            {"turns": ["hi", "more"]},
            {"text": "hi"},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]},
        ],
    )
    def test_forms_of_a_record(self, record):
        assert conversation(record) == [{"role": "user", "content": "hi"}]

    def test_a_system_message_stays(self):
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
        assert conversation({"messages": messages}) == messages

    @pytest.mark.parametrize(
        "record", [{}, {"prompt": " "}, {"prompt": 3}, {"messages": [{"role": "assistant", "content": "a"}]}]
    )
    def test_what_is_no_prompt(self, record):
        assert conversation(record) == []


class TestReadChat:
    class Words:
        chat_template = "any"

        def apply_chat_template(self, messages, add_generation_prompt, tokenize):
            assert add_generation_prompt
            assert not tokenize
            return "begin " + messages[-1]["content"]

        def encode(self, text, add_special_tokens=True):
            assert not add_special_tokens, "the template has them"
            return [len(word) for word in text.split()]

    @pytest.fixture(autouse=True)
    def tokenizer(self, monkeypatch):
        import transformers

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: self.Words())

    def test_the_same_ones_every_time(self, tmp_path: Path):
        lines = [json.dumps({"prompt": "x" * (n + 1)}) for n in range(50)]
        (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n\n")
        with gzip.open(tmp_path / "p.jsonl.gz", "wt") as packed:
            packed.write("\n".join(lines))
        first = read_chat(tmp_path / "p.jsonl", tmp_path, 5, 100)
        again = read_chat(tmp_path / "p.jsonl.gz", tmp_path, 5, 100)
        assert len(first.ids) == 5
        assert first.ids == again.ids
        assert first.ids != [[5, n + 1] for n in range(5)], "not just the first ones"
        assert read_chat(tmp_path / "p.jsonl", tmp_path, 8, 100).ids[:5] == first.ids
        assert first.as_dict()["prompt_tokens"] == 2

    def test_what_leaves_no_room_is_left_out(self, tmp_path: Path):
        (tmp_path / "p.jsonl").write_text('{"text": "one two three"}\n{"text": "one"}')
        found = read_chat(tmp_path / "p.jsonl", tmp_path, 5, 2)
        assert found.ids == [[5, 3]]
        assert found.skipped == 1

    @pytest.mark.parametrize("text", ["", "{", '{"other": 1}', "[1]"])
    def test_files_without_prompts(self, tmp_path: Path, text: str):
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(ConfigError):
            read_chat(tmp_path / "p.jsonl", tmp_path, 1, 10)
        with pytest.raises(ConfigError):
            read_chat(tmp_path / "missing.jsonl", tmp_path, 1, 10)


class TestStrategies:
    def test_names_and_parameters(self):
        assert parse_strategies("verify,verify:draft_length=3:row_cost=0.5,static:order=sequential") == [
            {"strategy": "verify"},
            {"strategy": "verify", "draft_length": 3, "row_cost": 0.5},
            {"strategy": "static", "order": "sequential"},
        ]

    @pytest.mark.parametrize("text", ["", ",", "verify:3", "verify:=3"])
    def test_bad_ones(self, text):
        with pytest.raises(ConfigError):
            parse_strategies(text)


class TestTurns:
    def test_every_wave_goes_round_all_of_them(self):
        log: list[tuple[str, int]] = []
        fakes = [Fake("a", log=log), Fake("b", log=log), Fake("one", most=1, log=log)]
        take_turns(fakes, [[1, 2], [3], [4]], 2, 8, 2, False)
        assert log[:2] == [("a", 2), ("b", 2)], "the first wave once, untimed; who takes one prompt only stays away"
        assert log[2:] == [("a", 2), ("b", 2), ("b", 1), ("a", 1), ("b", 2), ("a", 2), ("a", 1), ("b", 1)]

    def test_rows_and_ratios(self):
        fast = Fake("fast", seconds=1.0, forwards=1)
        rows, ratios = take_turns(
            [fast, Fake(AUTOREGRESSIVE, seconds=3.0, forwards=4)], [[1, 2], [3, 4]], 1, 8, 3, False
        )
        assert (rows[0].tokens_per_second, rows[0].tokens_per_forward, rows[0].first_token_s) == (2, 2, 0.5)
        assert (rows[0].tokens, rows[0].same_text, rows[1].same_text) == (4, 1.0, None)
        (ratio,) = ratios
        assert (ratio.engine, ratio.speed, ratio.forwards) == ("fast", 3, 4)

    def test_no_ratio_without_autoregressive(self):
        rows, ratios = take_turns([Fake("a")], [[1]], 1, 8, 1, False)
        assert rows[0].same_text is None
        assert not ratios


class TestOurs:
    def test_verify_and_autoregressive_write_the_same_text(self, tmp_path: Path):
        core = _converted(tmp_path)
        contenders = [Ours(core, asked) for asked in parse_strategies("verify,autoregressive,verify:draft_length=2")]
        assert [c.name for c in contenders] == [
            "linocut verify",
            "linocut autoregressive",
            "linocut verify draft_length=2",
        ]
        rows, ratios = take_turns(contenders, [prompt_of(9), prompt_of(14), prompt_of(11)], 2, 12, 1, True)
        assert [row.tokens for row in rows] == [36, 36, 36]
        assert [row.same_text for row in rows] == [1.0, None, 1.0]
        assert rows[1].tokens_per_forward == pytest.approx(1.0)
        assert len(ratios) == 2

    def test_a_strategy_that_the_model_lacks(self, tmp_path: Path):
        with pytest.raises(ParameterError):
            Ours(_converted(tmp_path), {"strategy": "verify", "threshold": 0.5})


def _converted(tmp_path: Path):
    folder = converted_folder(tmp_path / "model")
    return engine("causal", model=str(folder))


class TestPeers:
    def test_a_batch_is_cut_behind_its_stops(self):
        assert _until_stop([5, 2, 0, 0], (2, 3)) == [5, 2]
        assert _until_stop([5, 6], (2,)) == [5, 6]
        assert _until_stop([5, 2, 6], ()) == [5, 2, 6]

    def test_llama_needs_its_file(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="no file"):
            LlamaPeer(tmp_path / "none.gguf", 64, torch.device("cpu"), ())
