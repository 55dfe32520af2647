"""Which entries are kept: masks over rows that are sorted by position, so that the kept ones stay
sorted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.kernels.common.rows import kept_first


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


def allocate_heads(
    score: Tensor, live: Tensor, count: Tensor, sinks: int, recent: int, share: float, floor: float
) -> Tensor:
    """Entries to keep per row and head, [B, K] int64: as many in all heads as `count` [B, K] gives
    them, or all live ones, where the rows of largest score [B, K, T] are (AdaKV, hard floor).

    Each head gets its protected rows, those of `select_top`, and the share `floor` of what the
    count then leaves free. What remains goes to the best rows of all heads; equal scores prefer
    the smaller index, then the first head.
    """
    uniform = torch.minimum(count, live.sum(-1))
    protected = _protected(live, count, sinks, recent, share)
    held = torch.minimum((live & protected).sum(-1), uniform)
    own = held + torch.floor((uniform - held).double() * floor).long()
    others = live & (_place(score, live, protected) >= own[..., None])
    # rows outermost, so that the smaller index comes first in whichever head it is
    score, others, protected = (x.transpose(1, 2).flatten(1) for x in (score, others, protected))
    total = torch.minimum(count.sum(1), live.sum((1, 2)))
    won = others & (_place(score, others, protected) < (total - own.sum(1))[:, None])
    return own + won.unflatten(1, (-1, count.shape[1])).sum(1)


def hold_back(live: Tensor, count: Tensor, interval: int) -> Tensor:
    """Entries to keep where eviction waits until `interval` more than count [B, K] are there, on
    average over the heads.

    live is [B, K, T]; the heads of a row with fewer live entries keep them all.
    """
    entries = live.sum(-1)
    due = entries.sum(1, keepdim=True) >= (count + interval).sum(1, keepdim=True)
    return torch.where(due, count, entries)


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
    protected = _protected(live, count, sinks, recent, share)
    return live & (_place(score, live, protected) < count[..., None])


def select_chunks(score: Tensor, live: Tensor, count: Tensor, chunk: int, recent: int) -> Tensor:
    """Keep whole chunks of `chunk` live rows, the same in all heads, and the newest rows, at most
    `count` [B, K] in total (ChunkKV): score, live [B, K, T] -> [B, K, T] bool.

    The newest are `recent` rows and those before them that fill no chunk. Chunks rank by the mean
    score over rows and heads; equal ones prefer the smaller index, NaN is the smallest. Heads of a
    row must be live alike.
    """
    order, rows = kept_first(live)
    tail = torch.minimum(recent + (rows - recent) % chunk, rows)
    ordered = F.pad(score.float().gather(2, order), (0, -score.shape[2] % chunk))
    mean = (
        ordered.unflatten(2, (-1, chunk))
        .mean(3)
        .mean(1, keepdim=True)
        .expand(-1, rows.shape[1], -1)
    )
    index = torch.arange(mean.shape[2], device=score.device)
    whole = index < ((rows - tail) // chunk)[..., None]
    place = _place(mean, whole, torch.zeros_like(whole))
    chosen = whole & (place < torch.div(count - tail, chunk, rounding_mode="floor")[..., None])
    kept = chosen.repeat_interleave(chunk, 2)[..., : score.shape[2]]
    at = torch.arange(score.shape[2], device=score.device)
    newest = (at >= (rows - torch.minimum(tail, count))[..., None]) & (at < rows[..., None])
    return torch.zeros_like(live).scatter(2, order, kept | newest)


def _protected(live: Tensor, count: Tensor, sinks: int, recent: int, share: float) -> Tensor:
    """The first `sinks` live rows, and the newest `recent` plus that share of count [B, K]."""
    rank = live.long().cumsum(-1)
    newest = live.sum(-1) - recent - torch.floor(count.float() * share).long()
    return (rank <= sinks) | (rank > newest[..., None])


def _place(score: Tensor, live: Tensor, protected: Tensor) -> Tensor:
    """How many rows [..., T] are preferred to each: protected ones in their order, then live ones
    by score, then the others.
    """
    ranked = score.float().masked_fill(score.isnan(), float("-inf"))
    ranked = ranked.masked_fill(protected, float("inf"))
    order = torch.argsort(ranked, dim=-1, descending=True, stable=True)
    tier = live.long() * (1 + protected.long())
    tier = tier.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, tier)
    index = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, index.expand_as(order))
