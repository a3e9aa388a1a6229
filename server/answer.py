"""One choice on its way from tokens to text: detokenized, cut at stop strings, counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from linocut.engine.messages import ChoiceOutput

from .detokenizer import Detokenizer
from .stop_strings import StopStrings


@dataclass(frozen=True)
class AnswerRules:
    """What the client said about the text of its answers.

    stop_token_ids: the client's own (the family's stop ids are not among them). Stop strings are not looked for in the
    text of the first `min_tokens` tokens.
    """

    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    include_stop: bool = False


@dataclass
class Delta:
    """What is new in one choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def extend(self, later: Delta) -> None:
        self.text += later.text
        self.token_ids.extend(later.token_ids)
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class Answer:
    """tokens: committed tokens up to the end of the answer, the stop token included."""

    def __init__(self, index: int, detokenizer: Detokenizer, rules: AnswerRules) -> None:
        self.index = index
        self.tokens = 0
        self.finish_reason: str | None = None
        self.forwards = 0
        self.positions = 0
        self.cached_tokens = 0
        self._detokenizer = detokenizer
        self._rules = rules
        self._stops = StopStrings(rules.stops)

    def push(self, output: ChoiceOutput) -> Delta:
        """Take a step's tokens. After a stop string `finish_reason` is set before the engine has set its own."""
        self.forwards, self.positions = output.forwards, output.positions
        self.cached_tokens = output.cached_tokens
        delta = Delta(self.index)
        visible = output.token_ids
        if output.stop_token is not None and not self._rules.include_stop:
            visible = visible[:-1]
        if self._rules.stops:
            # Token by token: what counts as the answer must not depend on how many a step has committed.
            for token in visible:
                delta.text += self._find_stop([token])
                delta.token_ids.append(token)
                if self._stops.matched is not None:
                    return self._finish(delta, "stop", self._stops.matched)
        else:
            delta.text = self._detokenizer.push(visible)
            delta.token_ids = visible
            self.tokens += len(visible)
        if output.finish_reason is not None:
            delta.text += self._flush()
            if self._stops.matched is not None:
                return self._finish(delta, "stop", self._stops.matched)
            delta.token_ids = output.token_ids
            self.tokens += len(output.token_ids) - len(visible)
            own = output.stop_token is not None and output.stop_token in self._rules.stop_token_ids
            return self._finish(delta, output.finish_reason, output.stop_token if own else None)
        return delta

    def _find_stop(self, ids: list[int]) -> str:
        self.tokens += len(ids)
        text = self._detokenizer.push(ids)
        if self.tokens <= self._rules.min_tokens:
            return text
        return self._match(text)

    def _match(self, text: str) -> str:
        text = self._stops.push(text)
        if self._stops.matched is not None and self._rules.include_stop:
            text += self._stops.matched
        return text

    def _flush(self) -> str:
        text = self._detokenizer.flush()
        if self.tokens > self._rules.min_tokens:
            text = self._match(text)
        return text if self._stops.matched is not None else text + self._stops.flush()

    def _finish(self, delta: Delta, reason: str, stop_reason: str | int | None) -> Delta:
        self.finish_reason = delta.finish_reason = reason
        delta.stop_reason = stop_reason
        return delta
