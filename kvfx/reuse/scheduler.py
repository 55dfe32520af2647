"""Which waiting request is computed next: the one with the least to compute, but none too late.

Source: KVShare (arXiv 2503.16525) orders by hit rate and names no remedy for those that wait. The
credit for age, first come first served for a long queue, and the rule for shared fragments (both in
SGLang's `schedule_policy.py`) are choices made here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kvfx.errors import InputError


@dataclass(frozen=True)
class Waiting:
    """A request of `tokens` tokens, of which `reused` need not be computed, that `arrived` at a
    time in seconds.

    `fragments` are the hashes of what it would compute and others could reuse: no longer those that
    are stored by now.
    """

    key: str
    tokens: int
    reused: int
    arrived: float
    fragments: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.reused <= self.tokens:
            raise InputError(
                f"request {self.key}: {self.reused} tokens of {self.tokens} cannot be reused"
            )
        if not math.isfinite(self.arrived):
            raise InputError(f"request {self.key} arrived at {self.arrived}: give a time")

    @property
    def computed(self) -> int:
        """Tokens to compute."""
        return self.tokens - self.reused


def order(
    waiting: Iterable[Waiting], now: float, *, ageing: float, fallback: int = 128
) -> list[Waiting]:
    """The requests in the order in which to compute them: ascending tokens to compute, less
    `ageing` tokens for every second waited until `now`; equal ones stay in the order given.

    A request that shares a fragment with an earlier one goes behind all that share none: once the
    earlier one is computed and the fragment stored, it has less to compute. More than `fallback`
    requests are served as they came.

    For requests of one length and `ageing=0` this is the order of hit rates, highest first. With
    `ageing > 0` nothing that arrives `computed / ageing` seconds after a request, or later, is ever
    ahead of it but by a shared fragment, and the first of the order shares none with an earlier
    one: every request is served. Raises InputError for an `ageing` below 0.
    """
    if not 0 <= ageing < math.inf:
        raise InputError(f"order(ageing={ageing}): use tokens per second, 0 or more")
    requests = list(waiting)
    if len(requests) > fallback:
        return sorted(requests, key=lambda request: request.arrived)
    ranked = sorted(
        requests, key=lambda request: request.computed - ageing * (now - request.arrived)
    )
    ahead: list[Waiting] = []
    behind: list[Waiting] = []
    claimed: set[int] = set()
    for request in ranked:
        if claimed.isdisjoint(request.fragments):
            claimed |= request.fragments
            ahead.append(request)
        else:
            behind.append(request)
    return ahead + behind
