"""Which entries are kept: masks over rows that are sorted by position, so that the kept ones stay
sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def allocate_uniform(
    tokens: Tensor, kv_heads: int, fraction: float, entries: int, least: int
) -> Tensor:
    """Entries to keep per row and head, [B, K] int64: `entries`, or that `fraction` of tokens [B]
    when it is 0.

    Never fewer than `least`; it may be more than there are tokens.
    """
    wanted = (
        torch.full_like(tokens, entries)
        if entries
        else torch.ceil(tokens.double() * fraction).long()
    )
    return wanted.clamp(min=least)[:, None].expand(-1, kv_heads)


def hold_back(live: Tensor, count: Tensor, interval: int) -> Tensor:
    """Entries to keep where eviction waits until `interval` more than count [B, K] are there.

    live is [B, K, T]; a row and head with fewer live entries keeps them all.
    """
    entries = live.sum(-1)
    return torch.where(entries >= count + interval, count, entries)


def select_recent(live: Tensor, count: Tensor, sinks: int) -> Tensor:
    """Keep the first `sinks` live rows and the newest ones, `count` [B, K] in total: live [B, K, T]
    -> [B, K, T] bool.
    """
    rank = live.long().cumsum(-1)
    newest = live.sum(-1)[..., None] - (count[..., None] - sinks).clamp(min=0)
    return live & (
        (rank <= torch.minimum(count, torch.full_like(count, sinks))[..., None]) | (rank > newest)
    )


def select_top(
    score: Tensor, live: Tensor, count: Tensor, sinks: int, recent: int, share: float = 0.0
) -> Tensor:
    """Keep `count` [B, K] live rows: the first `sinks`, the last `recent` and that `share` of the
    count, then those of largest score [B, K, T].

    Equal scores prefer the smaller index, NaN is the smallest score; rows that are not live are
    never kept.
    """
    rank = live.long().cumsum(-1)
    newest = live.sum(-1) - recent - torch.floor(count.float() * share).long()
    protected = (rank <= sinks) | (rank > newest[..., None])
    ranked = score.float().masked_fill(score.isnan(), float("-inf"))
    ranked = ranked.masked_fill(protected, float("inf"))
    order = torch.argsort(ranked, dim=-1, descending=True, stable=True)
    # protected rows first, in their order, and rows that are not live last
    tier = live.long() * (1 + protected.long())
    tier = tier.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, tier)
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return live & (place < count[..., None])
