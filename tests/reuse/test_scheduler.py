"""The order of waiting requests: by what is left to compute, with an end to every wait (KS-8)."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfx.errors import InputError
from kvfx.reuse.scheduler import Waiting, order

requests = st.builds(
    lambda key, tokens, share, arrived, fragments: Waiting(
        str(key), tokens, int(tokens * share), arrived, fragments
    ),
    st.integers(0, 99),
    st.integers(0, 500),
    st.floats(0, 1),
    st.integers(0, 50),
    st.frozensets(st.integers(0, 5), max_size=2),
)
queues = st.lists(requests, max_size=30)
ages = st.sampled_from([0.0, 0.5, 7.0])


@given(queues, ages, st.integers(0, 40))
def test_nobody_is_lost_and_nobody_comes_twice(queue, ageing, fallback):
    ordered = order(queue, 60.0, ageing=ageing, fallback=fallback)
    assert Counter(ordered) == Counter(queue)
    assert ordered == order(iter(queue), 60.0, ageing=ageing, fallback=fallback)


@given(queues, ages)
def test_without_shared_fragments_the_least_work_comes_first(queue, ageing):
    queue = [Waiting(q.key, q.tokens, q.reused, q.arrived) for q in queue]
    ordered = order(queue, 60.0, ageing=ageing)
    keys = [q.tokens - q.reused - ageing * (60.0 - q.arrived) for q in ordered]
    assert keys == sorted(keys)
    places = {id(request): place for place, request in enumerate(queue)}
    for (left, key), (right, other) in pairwise(zip(ordered, keys, strict=True)):
        assert key < other or places[id(left)] < places[id(right)]


@given(st.lists(st.integers(0, 100), max_size=20))
def test_requests_of_one_length_go_by_hit_rate(reused):
    queue = [Waiting(str(place), 100, hits, 0.0) for place, hits in enumerate(reused)]
    rates = [request.reused / request.tokens for request in order(queue, 9.0, ageing=0.0)]
    assert rates == sorted(rates, reverse=True)


@given(queues, ages)
def test_who_shares_a_fragment_with_an_earlier_one_waits_for_all_others(queue, ageing):
    ordered = order(queue, 60.0, ageing=ageing)
    claimed: set[int] = set()
    shares = []
    for request in ordered:
        shares.append(not claimed.isdisjoint(request.fragments))
        if not any(shares):
            claimed |= request.fragments
    assert shares == sorted(shares)


def test_the_second_of_two_that_share_goes_last():
    first = Waiting("first", 10, 0, 0.0, frozenset({1}))
    second = Waiting("second", 20, 0, 0.0, frozenset({1, 2}))
    third = Waiting("third", 30, 0, 0.0, frozenset({2}))
    alone = Waiting("alone", 40, 0, 0.0)
    ordered = order([alone, third, second, first], 0.0, ageing=0.0)
    # the second goes behind, so what only it shares with the third holds nobody back
    assert [request.key for request in ordered] == ["first", "third", "alone", "second"]


def test_a_long_queue_is_served_as_it_came():
    queue = [Waiting(str(n), 100, n, float(n % 7), frozenset({1})) for n in range(9)]
    assert order(queue, 9.0, ageing=1.0, fallback=8) == sorted(queue, key=lambda r: r.arrived)
    assert order(queue, 9.0, ageing=0.0, fallback=9)[0].reused == 8
    assert order([], 0.0, ageing=0.0) == []


@pytest.mark.parametrize("shared", [frozenset(), frozenset({1})], ids=["apart", "shared"])
@pytest.mark.parametrize(("ageing", "longest"), [(10.0, 100), (50.0, 20)])
def test_no_wait_is_longer_than_work_over_ageing(ageing, longest, shared):
    """One request a second is served, and one with nothing to compute arrives every second."""
    queue = [Waiting("large", 1000, 0, 0.0, shared)]
    for now in range(longest + 2):
        queue.append(Waiting(str(now), 10, 10, float(now), shared))
        served = order(queue, float(now), ageing=ageing)[0]
        if served.key == "large":
            break
        queue.remove(served)
    assert served.key == "large"
    assert now <= longest


def test_without_ageing_it_waits_for_ever():
    queue = [Waiting("large", 1000, 0, 0.0)]
    for now in range(300):
        queue.append(Waiting(str(now), 10, 10, float(now)))
        queue.remove(order(queue, float(now), ageing=0.0)[0])
    assert [request.key for request in queue] == ["large"]


@given(queues.filter(bool), st.sampled_from([0.5, 7.0]))
def test_every_queue_comes_to_an_end(queue, ageing):
    """While a new request with nothing to compute arrives for each one that is served."""
    worst = max(request.computed for request in queue)
    left = Counter(queue)
    for now in range(50, 50 + 2 * len(queue) + math.ceil(worst / ageing)):
        new = Waiting("new", 5, 5, float(now))
        queue = [*queue, new]
        served = order(queue, float(now), ageing=ageing, fallback=10_000)[0]
        queue.remove(served)
        left -= Counter([served])
    assert not left


@pytest.mark.parametrize("ageing", [-1.0, math.nan, math.inf])
def test_ageing_is_tokens_per_second(ageing):
    with pytest.raises(InputError, match="ageing"):
        order([], 0.0, ageing=ageing)


def test_a_request_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="a: 5 tokens of 4"):
        Waiting("a", 4, 5, 0.0)
    with pytest.raises(InputError, match="a: -1 tokens of 4"):
        Waiting("a", 4, -1, 0.0)
    with pytest.raises(InputError, match="arrived at nan"):
        Waiting("a", 4, 1, math.nan)
