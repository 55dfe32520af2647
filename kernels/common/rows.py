"""Rows and entries: which are live, and in which order they are stored."""

from __future__ import annotations

import torch
from torch import Tensor


def live_rows(position_ids: Tensor, kv_heads: int) -> Tensor:
    """Rows that are not padding, for every KV head: position_ids [B, S] -> [B, K, S] bool."""
    return (position_ids >= 0)[:, None].expand(-1, kv_heads, -1)


def position_rows(position_ids: Tensor, kv_heads: int) -> Tensor:
    """The position of each row, for every KV head: position_ids [B, S] -> [B, K, S]."""
    return position_ids[:, None].expand(-1, kv_heads, -1)


def places(live: Tensor, position: Tensor | None) -> Tensor:
    """Where rows stand [B, K, T] int64: at their position, or at their rank among live rows."""
    return live.long().cumsum(-1) - 1 if position is None else position.long()


def live_entries(cache: Tensor, length: Tensor) -> Tensor:
    """Entries of cache [B, K, C, ...] that are live, length [B, K] of them: [B, K, C] bool."""
    return torch.arange(cache.shape[2], device=cache.device) < length[..., None]


def kept_first(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Row indices with the kept ones first, in their order, and their count: keep [B, K, S] -> [B,
    K, S], [B, K].
    """
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
    return order, keep.sum(-1)


def entry_shift(keep: Tensor, position_ids: Tensor | None, length: Tensor | None) -> Tensor:
    """How far each row is from its position to the index of its entry in the cache.

    keep is [B, K, S]; position_ids [B, S] (None: rows are entries of a cache, at their own index);
    length [B, K] are the entries already there (None: an empty cache). Returns [B, K, S] int64.
    """
    rank = keep.long().cumsum(-1) - 1
    target = rank if length is None else rank + length.long()[..., None]
    if position_ids is None:
        return target - torch.arange(keep.shape[-1], device=keep.device)
    return target - position_ids[:, None]
