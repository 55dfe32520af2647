"""Serving: every request is answered, with the tokens that it gets alone, in the order in which
work is left. Clocks are made up: nobody sleeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import pytest
import torch

import kvfx
from kvfx.errors import InputError
from kvfx.model import CompressedModel
from kvfx.reuse import Layout, Pool, Reply, Request, requests, serve
from kvfx.testing.live_rows import some_tokens
from kvfx.testing.tiny import tiny_llama

NEW = 4


def text(seed: int, length: int) -> list[int]:
    return some_tokens(length, seed).tolist()


DOCUMENTS = [text(seed, 20) for seed in range(4)]


@cache
def compressed() -> CompressedModel:
    """A tiny model with all its entries kept; shared."""
    return kvfx.compress(tiny_llama(), "Full()", compile=False, verify=False)


@dataclass
class Clock:
    """A second passes with every look at it that is not the first."""

    tick: float = 1.0
    now: float = 100.0
    waits: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def wait(self, seconds: float) -> None:
        """Let the time pass."""
        assert seconds > 0
        self.waits.append(seconds)
        self.now += seconds


class Watched(Pool):
    """A pool that notes the prompts that it is asked for."""

    def prefill(self, layout):
        """As `Pool` does it."""
        self.__dict__.setdefault("asked", []).append(layout)
        return super().prefill(layout)


def pool(policy: str = "ExactPrefix()") -> Watched:
    return Watched(compressed(), policy)


def request(key: str, *pieces: Sequence[int], new: int = NEW, arrived: float = 0.0) -> Request:
    return Request(key, Layout.of(pieces), new, arrived)


def answered(using: Pool, asked: Sequence[Request], clock: Clock | None = None, **knobs):
    """The replies by key, in the order in which they came."""
    clock = clock or Clock()
    replies = serve(using, asked, clock=clock, wait=clock.wait, **knobs)
    return {reply.key: reply for reply in replies}


def alone(asked: Request) -> tuple[int, ...]:
    """The tokens that a request gets from the model without a pool."""
    ids = torch.tensor([asked.layout.tokens])
    out = compressed().generate(ids, max_new_tokens=asked.max_new_tokens, do_sample=False)
    return tuple(out[0, ids.shape[1] :].tolist())


def prefilled(using: Watched, asked: Sequence[Request]) -> list[str]:
    """The keys of requests in the order in which they were prefilled."""
    names = {id(each.layout): each.key for each in asked}
    return [names[id(layout)] for layout in using.__dict__["asked"]]


@pytest.mark.parametrize(
    ("policy", "active"),
    [("ExactPrefix()", 1), ("ExactPrefix()", 3), ("EPIC(k=99)", 9), ("CacheBlend(ratio=1.0)", 3)],
)
def test_everybody_gets_what_it_would_get_alone(policy, active):
    """Policies that compute all, or nothing that is not exact."""
    asked = [
        request(
            str(seed),
            DOCUMENTS[seed % 3],
            DOCUMENTS[(seed + 1) % 2],
            text(50 + seed, 5),
            new=1 + seed,
        )
        for seed in range(6)
    ]
    using = pool(policy)
    found = answered(using, asked, active=active)
    assert sorted(found) == [each.key for each in asked]
    assert {each.key: found[each.key].tokens for each in asked} == {
        each.key: alone(each) for each in asked
    }
    assert using.totals.calls == len(asked)
    assert using.totals.calls_reused > 0
    for reply in found.values():
        assert 0 < reply.first <= reply.finished
        assert (reply.first == reply.finished) == (len(reply.tokens) == 1)
        assert reply.served.tokens == 44


def test_the_least_to_compute_comes_first():
    using = pool()
    using.prefill([DOCUMENTS[0], DOCUMENTS[1], text(1, 5)])
    using.__dict__["asked"].clear()
    asked = [
        request("30 new", text(60, 30)),
        request("10 new", text(61, 10)),
        request("40 known and 5 new", DOCUMENTS[0], DOCUMENTS[1], text(62, 5)),
        request("20 known and 7 new", DOCUMENTS[0], text(63, 7)),
    ]
    found = answered(using, asked, active=1, ageing=0.0)
    expected = ["40 known and 5 new", "20 known and 7 new", "10 new", "30 new"]
    assert prefilled(using, asked) == list(found) == expected


def test_nobody_is_answered_before_it_came():
    asked = [
        request("late", text(1, 5), arrived=900.0),
        request("soon", text(2, 30), arrived=50.0),
        request("now", text(3, 40)),
    ]
    using, clock = pool(), Clock()
    found = answered(using, asked, clock, active=3)
    assert list(found) == prefilled(using, asked) == ["now", "soon", "late"]
    assert len(clock.waits) == 2
    # from the wait on, a look at the clock for the round and one per token
    assert [(reply.first, reply.finished) for reply in found.values()][1:] == [(2.0, 8.0)] * 2


def test_a_request_that_waits_gets_ahead():
    asked = [
        request("first", text(1, 5)),
        request("long", text(2, 60)),
        request("short", text(3, 6), arrived=3.0),
    ]
    for ageing, expected in ((0.0, ["first", "short", "long"]), (40.0, ["first", "long", "short"])):
        using = pool()
        found = answered(using, asked, active=1, ageing=ageing)
        assert prefilled(using, asked) == list(found) == expected


@pytest.mark.parametrize("active", [1, 2, 3])
def test_so_many_are_answered_at_once(active, monkeypatch):
    """Each gets a token in turns, as soon as there is room for it."""
    using, stepped = pool(), []
    step = requests._step

    def noted(served_by: Pool, running) -> None:
        stepped.append(running.request.key)
        step(served_by, running)

    monkeypatch.setattr(requests, "_step", noted)
    asked = [request(str(seed), text(seed, 9), new=NEW) for seed in range(3)]
    found = answered(using, asked, active=active, ageing=0.0)
    turns = {
        1: "000011112222",
        2: "001010112222",
        3: "001012012122",
    }
    assert "".join(stepped) == turns[active]
    assert list(found) == ["0", "1", "2"]


def test_who_asks_for_little_is_done_first():
    asked = [request(str(new), text(new, 9), new=new) for new in (9, 5, 1)]
    found = answered(pool(), asked, active=3)
    assert list(found) == ["1", "5", "9"]
    assert [len(reply.tokens) for reply in found.values()] == [1, 5, 9]


@pytest.mark.parametrize("several", [False, True])
def test_the_end_of_a_text_ends_a_reply(several, monkeypatch):
    asked = request("a", text(7, 9), new=9)
    config = compressed().generation_config
    monkeypatch.setattr(config, "eos_token_id", None)
    tokens = alone(asked)
    assert answered(pool(), [asked])["a"].tokens == tokens
    end = tokens[3]
    monkeypatch.setattr(config, "eos_token_id", [98, end] if several else end)
    cut = tokens[: tokens.index(end) + 1]
    assert len(cut) < 9
    assert answered(pool(), [asked])["a"].tokens == alone(asked) == cut


def test_who_shares_a_document_comes_when_it_is_stored(monkeypatch):
    """Requests of one length: the second of one document is next, and computes its own part."""
    asked = [
        request("a", DOCUMENTS[0], text(60, 6)),
        request("other", DOCUMENTS[1], text(61, 6)),
        request("b", DOCUMENTS[0], text(62, 6)),
    ]
    seen, order = [], requests.order

    def noted(waiting, now, *, ageing):
        seen.append({each.key: each for each in waiting})
        return order(waiting, now, ageing=ageing)

    monkeypatch.setattr(requests, "order", noted)
    using = pool()
    found = answered(using, asked, active=3, ageing=0.0)
    assert prefilled(using, asked) == ["a", "b", "other"]
    assert [found[key].served.computed for key in ("a", "b", "other")] == [25, 5, 25]
    first, second, third = seen
    assert first["a"].fragments == first["b"].fragments != first["other"].fragments
    assert {len(each.fragments) for each in first.values()} == {1}
    assert {each.computed for each in first.values()} == {26}
    assert (second["b"].computed, second["b"].fragments) == (6, frozenset())
    assert (second["other"].computed, list(third)) == (26, ["other"])


def test_documents_that_differ_come_before_those_that_are_shared(monkeypatch):
    """While one document is not stored, who shares it is behind all who share none."""
    asked = [
        request("a", DOCUMENTS[0], text(60, 6)),
        request("b", DOCUMENTS[0], text(62, 6)),
        request("other", DOCUMENTS[1], text(61, 6)),
    ]
    using = pool()
    monkeypatch.setattr(using.finder, "learn", lambda outcome: None)
    answered(using, asked, active=1, ageing=0.0)
    # nothing is ever stored here: the first of each order is the first that came
    assert prefilled(using, asked) == ["a", "b", "other"]
    seen, order = [], requests.order

    def noted(waiting, now, *, ageing):
        found = order(waiting, now, ageing=ageing)
        seen.append([each.key for each in found])
        return found

    monkeypatch.setattr(requests, "order", noted)
    answered(using, asked, active=1, ageing=0.0)
    assert seen == [["a", "other", "b"], ["b", "other"], ["other"]]


def test_fragments_of_earlier_requests_count_as_computed():
    """KVShare's own measure of what is left."""
    asked = [
        request("a", DOCUMENTS[0] + DOCUMENTS[1], text(60, 6)),
        request("same", text(63, 9) + DOCUMENTS[0] + DOCUMENTS[1], text(62, 6)),
        request("new", text(61, 30), text(64, 6)),
    ]
    using = pool("KVShare(least=16, window=8)")
    using.prefill(asked[0].layout)
    using.__dict__["asked"].clear()
    found = answered(using, asked[1:], active=1, ageing=0.0)
    assert prefilled(using, asked) == list(found) == ["same", "new"]
    assert found["new"].served.computed == 35
    assert found["same"].served.computed < 20


def test_nothing_asked_is_nothing_answered():
    clock = Clock()
    assert serve(pool(), [], clock=clock, wait=clock.wait) == []


def test_what_cannot_be_served_is_refused():
    asked = [request("a", text(1, 5)), request("a", text(2, 5))]
    using = pool()
    for given, active in ((asked, 4), (asked[:1], 0)):
        with pytest.raises(InputError, match="names of their own, and active >= 1"):
            serve(using, given, active=active)
    assert "asked" not in using.__dict__


def test_replies_come_in_the_order_in_which_they_finish():
    asked = [request(str(seed), text(seed, 9), new=1 + seed % 3) for seed in range(5)]
    clock = Clock()
    replies: list[Reply] = serve(pool(), asked, active=2, clock=clock, wait=clock.wait)
    assert all(left.finished < right.finished for left, right in pairwise(replies))
