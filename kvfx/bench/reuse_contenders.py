"""Ways to the first token of a prompt: computed whole, or with rows of earlier prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kvfx.model import CompressedCache, CompressedModel
from kvfx.reuse.account import Served
from kvfx.reuse.agents import Agents, Slot, Text
from kvfx.reuse.layout import Layout
from kvfx.reuse.pool import Pool, Prefilled

DENSE = "dense"
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Filled:
    """A prompt that was read to its end: the `cache` of all its tokens, the `logits` [V] of the
    next one, what the prompt was made of, and the seconds of the step that read its last token.
    """

    cache: CompressedCache
    logits: Tensor
    served: Served
    last_seconds: float


@dataclass(frozen=True, eq=False)
class Contender:
    """Reads the prompt of an agent ("" without agents). `publish` computes a text alone, and does
    nothing where texts are not computed alone; `stored` says how many bytes are kept, `clear`
    forgets them.
    """

    name: str
    fill: Callable[[str, Layout], Filled]
    publish: Callable[[Sequence[int]], object]
    stored: Callable[[], int]
    clear: Callable[[], None]


def dense(fast: CompressedModel) -> Contender:
    """The compressed model's own prefill of the whole prompt."""

    def fill(agent: str, layout: Layout) -> Filled:
        ids = torch.tensor([layout.tokens], device=fast.device)
        cache = fast.new_cache()
        logits, seconds = timed(fast, lambda: _logits(fast, ids, cache))
        body = ids.shape[1] - 1
        served = Served(body, 0, 0, 0, body, 0, {"compute": seconds})
        return Filled(cache, logits, served, 0.0)

    return Contender(DENSE, fill, lambda text: None, lambda: 0, lambda: None)


def pooled(fast: CompressedModel, policy: str) -> Contender:
    """A pool under `policy`."""
    pool = Pool(fast, policy)
    return Contender(
        policy,
        lambda agent, layout: _with_last(fast, pool.prefill(layout)),
        lambda text: None,
        lambda: pool.store.nbytes,
        pool.store.clear,
    )


def templated(
    fast: CompressedModel, templates: Mapping[str, Sequence[Text | Slot]], policy: str
) -> Contender:
    """Agents under `policy`, whose templates have a slot at every second piece."""
    agents = Agents(fast, templates, policy)

    def fill(agent: str, layout: Layout) -> Filled:
        slots = agents.templates[agent].slots
        texts = dict(zip(slots, layout.pieces[1::2], strict=True))
        return _with_last(fast, agents.prefill(agent, texts))

    def stored() -> int:
        fixed = (piece for template in agents.templates.values() for piece in template.pieces)
        return (
            agents.store.nbytes
            + sum(pool.nbytes for pool in agents.pools.values())
            + sum(piece.keys.nbytes + piece.values.nbytes for piece in fixed)
        )

    return Contender(policy, fill, agents.publish, stored, agents.store.clear)


def timed(fast: CompressedModel, run: Callable[[], Result]) -> tuple[Result, float]:
    """What `run` returns, and the seconds until the device of `fast` had it."""
    start = time.perf_counter()
    result = run()
    if fast.device.type == "cuda":
        torch.cuda.synchronize(fast.device)
    return result, time.perf_counter() - start


def _with_last(fast: CompressedModel, found: Prefilled) -> Filled:
    """Read the last token of a prompt, as a step of decoding."""
    last = found.input_ids[:, -1:]
    logits, seconds = timed(fast, lambda: _logits(fast, last, found.cache))
    return Filled(found.cache, logits, found.served, seconds)


def _logits(fast: CompressedModel, ids: Tensor, cache: CompressedCache) -> Tensor:
    """Read ids [1, S] into the cache: the logits [V] of the next token."""
    return fast(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
