"""Which neighbouring rows join one set, and which row leads it: what both backends do with the
cosines of neighbours.

A link at row t joins rows t and t + 1. Live rows lie next to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.errors import PolicyError

LINKAGES = ("chain", "anchor")


def check_linkage(linkage: str, threshold: float | None) -> None:
    """Raise PolicyError where sets cannot be found in this way."""
    if linkage not in LINKAGES:
        raise PolicyError(f"merge_sets: linkage is one of {', '.join(LINKAGES)}, not {linkage!r}")
    if linkage == "anchor" and threshold is None:
        raise PolicyError(
            "merge_sets: linkage 'anchor' needs a threshold: which rows it compares depends on "
            "the links that it makes; use linkage 'chain' for an exact number of entries"
        )


def protection(score: Tensor, live: Tensor, sinks: int, recent: float, heavy: float) -> Tensor:
    """When each row is given up for merging, [B, K, T] int64: 0 at once, larger numbers later.

    The first `sinks` live rows and the share `heavy` of the live rows that scores most among the
    others go in order of increasing score; then the newest share `recent`, the oldest first.
    """
    rows = live.shape[-1]
    count = live.sum(-1, keepdim=True)
    rank = live.long().cumsum(-1)
    newest = live & (rank > count - _share(count, recent))
    first = live & (rank <= sinks) & ~newest
    order, place = ranked(score)
    eligible = live & ~newest & ~first
    better = eligible.gather(-1, order).long().cumsum(-1).gather(-1, place)
    hitter = eligible & (better <= _share(count, heavy))
    stage = torch.where(first | hitter, rows - place, 0)
    return torch.where(newest, rows + rank, stage)


def _share(count: Tensor, fraction: float) -> Tensor:
    return torch.floor(count.double() * fraction).long()


def ranked(score: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by falling score, the smaller index first and NaN as the smallest, and the place of each
    row in that order.
    """
    order = torch.argsort(
        score.float().masked_fill(score.isnan(), float("-inf")),
        dim=-1, descending=True, stable=True,
    )  # fmt: skip
    return order, inverse(order)


def inverse(order: Tensor) -> Tensor:
    """The place of each row in `order` [B, K, T]."""
    index = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, index)


def beside(free: Tensor) -> Tensor:
    """Whether a row and the one behind it are both free: [B, K, T] bool, the last never."""
    both = torch.zeros_like(free)
    both[..., :-1] = free[..., :-1] & free[..., 1:]
    return both


def links(
    cosine: Tensor, stage: Tensor, live: Tensor, count: Tensor, threshold: float | None
) -> Tensor:
    """The links that are made, [B, K, T] bool.

    With a threshold, those of larger cosine whose rows are both free. Without one, as many as leave
    `count` [B, K] sets: of links whose rows are given up earlier, then of larger cosine, then
    of smaller index, the first ones.
    """
    if threshold is not None:
        return beside(live & (stage == 0)) & (cosine > threshold)
    rows = live.shape[-1]
    possible = beside(live)
    later = torch.maximum(stage, stage.roll(-1, -1)).masked_fill(~possible, 3 * rows)
    order = ranked(cosine)[0]
    order = order.gather(-1, later.gather(-1, order).argsort(dim=-1, stable=True))
    wanted = live.sum(-1) - count
    return possible & (inverse(order) < wanted[..., None])


def leaders(link: Tensor, score: Tensor, live: Tensor) -> Tensor:
    """The target of each row: the row of its set that scores most, [B, K, T] int64."""
    order, place = ranked(score)
    starts = torch.ones_like(link)
    starts[..., 1:] = ~link[..., :-1]
    number = starts.long().cumsum(-1) - 1
    best = torch.full_like(place, live.shape[-1]).scatter_reduce(-1, number, place, "amin")
    return torch.where(live, order.gather(-1, best.gather(-1, number)), -1)
