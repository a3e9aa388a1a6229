"""Which engine a request goes to."""

from __future__ import annotations

from linocut.engine.messages import AddRequest
from linocut.engine.params import DecodingParams, SamplingParams
from linocut.server.routing import CHUNK, Router

SPACE = 100 * CHUNK
IDLE = {0: 0, 1: 0, 2: 0}


def request(*chunks: int, salt: str = "") -> AddRequest:
    """A prompt of whole chunks, each of one token, and half a chunk behind them."""
    prompt = [token for token in chunks for _ in range(CHUNK)] + [9] * (CHUNK // 2)
    return AddRequest(
        request_id="r",
        prompt=prompt,
        sampling=SamplingParams(max_tokens=1),
        decoding=DecodingParams(strategy="static"),
        salt=salt,
    )


def router(spaces: tuple[int, ...] = (SPACE,) * 3, slack: int = 4) -> Router:
    return Router(spaces, slack)


def test_an_unknown_prompt_goes_to_the_least_loaded_engine():
    assert router().route(request(1), {0: 3, 1: 2, 2: 5}) == 1


def test_for_one_engine_no_prompt_is_hashed(monkeypatch):
    monkeypatch.delattr("linocut.server.routing.blake2b")
    assert router((SPACE,)).route(request(1, 2), {0: 9}) == 0


def test_engines_as_loaded_as_each_other_take_turns():
    routes = router()
    assert [routes.route(request(number), IDLE) for number in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_prompt_follows_its_beginning():
    routes = router()
    first = routes.route(request(1, 2), {0: 1, 1: 0, 2: 1})
    assert first == 1
    assert routes.route(request(1, 3), {0: 0, 1: 4, 2: 0}) == 1


def test_unless_that_engine_is_much_busier():
    routes = router()
    routes.route(request(1), {0: 0, 1: 1, 2: 1})
    assert routes.route(request(1), {0: 5, 1: 0, 2: 1}) == 1
    # Now both have it, and the less loaded one is preferred.
    assert routes.route(request(1), {0: 2, 1: 1, 2: 0}) == 1


def test_the_longest_beginning_wins():
    routes = router()
    routes.route(request(1), {0: 0, 1: 1, 2: 1})
    routes.route(request(1, 2), {1: 0})
    assert routes.route(request(1, 2, 3), {0: 0, 1: 3, 2: 0}) == 1
    assert routes.route(request(1, 4), {0: 0, 1: 3, 2: 0}) == 0


def test_what_comes_behind_another_beginning_is_another_beginning():
    routes = router()
    routes.route(request(1, 2), {0: 0, 1: 1, 2: 1})
    assert routes.route(request(3, 2), {0: 1, 1: 0, 2: 1}) == 1


def test_tenants_do_not_meet():
    routes = router()
    routes.route(request(1, salt="a"), {0: 0, 1: 1, 2: 1})
    assert routes.route(request(1, salt="b"), {0: 1, 1: 0, 2: 1}) == 1
    assert routes.route(request(1, salt="a"), {0: 1, 1: 0, 2: 1}) == 0


def test_less_than_a_chunk_is_no_beginning():
    routes = router()
    routes.route(request(), {0: 0, 1: 1, 2: 1})
    assert routes.route(request(), {0: 1, 1: 0, 2: 1}) == 1


def test_an_engine_that_is_full_or_gone_is_no_choice():
    routes = router()
    routes.route(request(1), {0: 0, 1: 1, 2: 1})
    assert routes.route(request(1), {1: 2, 2: 1}) == 2


def test_a_cache_that_is_gone_is_forgotten():
    routes = router()
    routes.route(request(1), {0: 0, 1: 1, 2: 1})
    routes.forget(0)
    assert routes.route(request(1), {0: 1, 1: 0, 2: 1}) == 1


def test_no_more_is_remembered_than_the_cache_holds_the_oldest_goes_first_and_ends_before_beginnings():
    routes = router((3 * CHUNK, SPACE, SPACE))
    routes.route(request(1, 2), {0: 0})
    routes.route(request(3, 4), {0: 0})
    near = {0: 1, 1: 0, 2: 0}
    assert routes._known(0, list(beginnings(1, 2))) == 1
    assert routes._known(0, list(beginnings(3, 4))) == 2
    routes.route(request(5, 6, 7, 8), {0: 0})
    assert routes._known(0, list(beginnings(5, 6, 7, 8))) == 3
    assert routes._known(0, list(beginnings(3, 4))) == 0
    assert routes.route(request(3, 4), near) == 1


def beginnings(*chunks: int) -> list[bytes]:
    from linocut.server.routing import _beginnings

    return list(_beginnings(request(*chunks)))


def test_engines_without_a_cache_are_chosen_by_load_alone():
    routes = router((0, 0, 0))
    routes.route(request(1), {0: 0, 1: 1, 2: 1})
    assert routes.route(request(1), {0: 1, 1: 0, 2: 1}) == 1
