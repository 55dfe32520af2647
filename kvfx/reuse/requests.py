"""`serve`: many requests on one machine, those with the least to compute first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvfx.errors import InputError
from kvfx.reuse.account import Served
from kvfx.reuse.layout import Layout
from kvfx.reuse.pool import Pool, Prefilled
from kvfx.reuse.scheduler import Waiting, order


@dataclass(frozen=True)
class Request:
    """A prompt, its name, how many tokens it asks for, and when it `arrived`, in seconds after
    `serve` began.
    """

    key: str
    layout: Layout
    max_new_tokens: int = 64
    arrived: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(
                f"request {self.key}: max_new_tokens={self.max_new_tokens}: ask for 1 or more"
            )


@dataclass(frozen=True)
class Reply:
    """What a request got: its `tokens`, the first of them `first` and the last `finished` seconds
    after it arrived.
    """

    key: str
    tokens: tuple[int, ...]
    served: Served
    first: float
    finished: float


@dataclass
class _Running:
    request: Request
    prefilled: Prefilled
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0


def serve(
    pool: Pool,
    requests: Sequence[Request],
    *,
    active: int = 4,
    ageing: float = 200.0,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[float], None] = time.sleep,
) -> list[Reply]:
    """Answer all requests greedily, in the order in which they finish: as soon as fewer than
    `active` are being answered, the waiting one with the least to compute is prefilled
    (`kvfx.reuse.scheduler`: `ageing` tokens of credit per second of waiting); those being answered
    get a token each in turns.

    Raises InputError for two requests of one name, and for no room for any.
    """
    names = [request.key for request in requests]
    if len(set(names)) < len(names) or active < 1:
        raise InputError(f"serve: {len(names)} requests need names of their own, and active >= 1")
    start = clock()
    waiting = sorted(requests, key=lambda request: request.arrived)
    running: list[_Running] = []
    replies: list[Reply] = []
    while waiting or running:
        now = clock() - start
        here = [request for request in waiting if request.arrived <= now]
        if not here and not running:
            wait(waiting[0].arrived - now)
            continue
        if here and len(running) < active:
            chosen = _next(pool, here, now, ageing)
            waiting.remove(chosen)
            running.append(_Running(chosen, pool.prefill(chosen.layout)))
        for each in list(running):
            _step(pool, each)
            now = clock() - start
            if len(each.tokens) == 1:
                each.first = now - each.request.arrived
            if _is_finished(pool, each):
                running.remove(each)
                replies.append(
                    Reply(
                        each.request.key,
                        tuple(each.tokens),
                        each.prefilled.served,
                        each.first,
                        now - each.request.arrived,
                    )
                )
    return replies


def _next(pool: Pool, here: Sequence[Request], now: float, ageing: float) -> Request:
    """The request to prefill."""
    facts = []
    for request in here:
        missing = pool.finder.missing(request.layout)
        tokens = len(request.layout.tokens)
        # what is asked last differs from request to request, and is never shared
        shared = frozenset(map(hash, missing[:-1]))
        computed = sum(map(len, missing))
        facts.append(
            Waiting(request.key, tokens, tokens - computed, request.arrived, fragments=shared)
        )
    first = order(facts, now, ageing=ageing)[0]
    return next(request for request in here if request.key == first.key)


def _step(pool: Pool, running: _Running) -> None:
    """One token more."""
    last = (
        torch.tensor([[running.tokens[-1]]], device=pool.fast.device)
        if running.tokens
        else running.prefilled.input_ids[:, -1:]
    )
    logits = pool.fast(last, past_key_values=running.prefilled.cache).logits
    running.tokens.append(int(logits[0, -1].argmax()))


def _is_finished(pool: Pool, running: _Running) -> bool:
    ends = pool.fast.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return len(running.tokens) >= running.request.max_new_tokens or running.tokens[-1] in ends
