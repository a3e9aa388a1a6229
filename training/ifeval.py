"""Loose accuracy on IFEval (Zhou et al., arXiv 2311.07911, section 2.2), with the checkers that lm-eval ships.

lm-eval as a whole brings some fifty packages and imports them at once. Its checkers need three small ones (`evaluate`
extra of this project), so only those modules are loaded. Instructions about sentences and about words in capitals need
NLTK's punkt data, which no package holds: without it they are left out, and the result names them.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from types import ModuleType
from typing import Any

HOW_TO_INSTALL = "pip install 'linocut[evaluate]' and pip install --no-deps lm-eval bring its checkers"
_PACKAGES = ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval")
Checkers = Mapping[str, Any]


def load() -> Checkers | None:
    """Checker classes by instruction id, or None where lm-eval or what its checkers need is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        with _bare_packages(spec.submodule_search_locations[0]), _no_download():
            registry = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry")
        # Detection draws at random unless it is told not to.
        importlib.import_module("langdetect").DetectorFactory.seed = 0
    except ImportError:
        return None
    checkers: Checkers = registry.INSTRUCTION_DICT
    return checkers


@contextmanager
def _bare_packages(folder: str) -> Iterator[None]:
    """Stand-ins for lm-eval's packages, whose own __init__ would import all of it."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lm_eval"}
    if "lm_eval.tasks" not in before:
        for name in _PACKAGES:
            stand_in = ModuleType(name)
            stand_in.__path__ = ["/".join([folder, *name.split(".")[1:]])]
            sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" and name not in before]:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def _no_download() -> Iterator[None]:
    """The checkers fetch NLTK's data when they are imported; an evaluation does not use the network."""
    nltk: Any = importlib.import_module("nltk")
    download = nltk.download
    nltk.download = lambda *_, **__: False
    try:
        with redirect_stdout(StringIO()):  # it says that it has downloaded
            yield
    finally:
        nltk.download = download


@dataclass
class Loose:
    """Followed or not: prompts (all instructions of one), instructions (each), and ids that could not be checked."""

    prompts: list[bool] = field(default_factory=list)
    instructions: list[bool] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)


def variants(response: str) -> list[str]:
    """The eight texts of which one has to follow: without first line, last line, both, and each without asterisks."""
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    texts = [response, *cut]
    return texts + [text.replace("*", "") for text in texts]


def loose(checkers: Checkers, answers: Sequence[tuple[Mapping[str, Any], str]]) -> Loose:
    """Check `answers`: (record with prompt, instruction_id_list and kwargs, response).

    An instruction whose checker lacks its data counts nowhere; a prompt with no other instruction is not counted.
    """
    state = random.getstate()
    try:
        return _loose(checkers, answers)
    finally:
        random.setstate(state)


def _loose(checkers: Checkers, answers: Sequence[tuple[Mapping[str, Any], str]]) -> Loose:
    result = Loose()
    known: dict[str, bool] = {}
    for record, response in answers:
        texts = [text for text in variants(response) if text.strip()]
        followed = []
        for name, given in zip(record["instruction_id_list"], record["kwargs"], strict=True):
            checker = _checker(checkers, name, given, record["prompt"])
            if name not in known:
                known[name] = checker is not None and _works(checker)
            if checker is None or not known[name]:
                result.left_out.add(name)
            else:
                followed.append(any(checker.check_following(text) for text in texts))
        result.instructions += followed
        if followed:
            result.prompts.append(all(followed))
    return result


def _checker(checkers: Checkers, name: str, given: Mapping[str, Any], prompt: str) -> Any:
    if name not in checkers:
        return None
    checker = checkers[name](name)
    # What is not given is drawn at random, and so is a letter that is none ("#"): for every answer the same.
    random.seed(0)
    checker.build_description(**{key: value for key, value in given.items() if value is not None})
    arguments = checker.get_instruction_args()
    if arguments and "prompt" in arguments:
        checker.build_description(prompt=prompt)
    return checker


def _works(checker: Any) -> bool:
    try:
        checker.check_following("One short sentence. And ANOTHER one.")
    except LookupError:
        return False
    return True
