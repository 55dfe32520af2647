"""Dense entries: keys and values as they are, one row per entry, sorted by position.

`k_cache` and `v_cache` are [B, K, C, D]; `length` [B, K] int32 counts the live entries of a row and
head. Whatever lies beyond `length` is garbage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.attention import attend_rows, attend_step
from kvfx.kernels.common.rows import kept_first


def store(
    k: Tensor, v: Tensor, keep: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor
) -> None:
    """Write the kept rows of k, v [B, K, S, D] behind the live entries; keep is [B, K, S] bool."""
    order, count = kept_first(keep)
    batch, kv_heads, capacity = k_cache.shape[:3]
    order = order[..., :capacity]
    slot = length.long()[..., None] + torch.arange(order.shape[-1], device=k.device)
    b = torch.arange(batch, device=k.device)[:, None, None]
    h = torch.arange(kv_heads, device=k.device)[:, None]
    live = torch.arange(order.shape[-1], device=k.device) < count[..., None]
    b, h, slot, order = (x.expand_as(live)[live] for x in (b, h, slot, order))
    k_cache[b, h, slot] = k[b, h, order]
    v_cache[b, h, slot] = v[b, h, order]
    length += count.to(length.dtype)


def append(
    k: Tensor, v: Tensor, keep: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor
) -> None:
    """Write one row k, v [B, K, 1, D] behind the live entries; a row that is not kept stays beyond
    the live length.
    """
    b = torch.arange(k.shape[0], device=k.device)[:, None]
    h = torch.arange(k.shape[1], device=k.device)
    slot = length.long()
    k_cache.index_put_((b, h, slot), k[:, :, 0])
    v_cache.index_put_((b, h, slot), v[:, :, 0])
    length.add_(keep[..., 0].to(length.dtype))


def attend(
    q: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, scale: float
) -> Tensor:
    """Attention of one row q [B, H, 1, D] over the live entries: [B, H, 1, Dv]. Entries never come
    after the row.
    """
    del position_ids
    live = torch.arange(k_cache.shape[2], device=q.device) < length[..., None]
    return attend_step(q, k_cache, v_cache, live, scale)


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    scale: float,
) -> Tensor:
    """Attention of S rows over the live entries and over themselves, before they are stored: [B, H,
    S, Dv].
    """
    live = torch.arange(k_cache.shape[2], device=q.device) < length[..., None]
    return attend_rows(q, k, v, position_ids, k_cache, v_cache, live, scale)


def load(k_cache: Tensor, v_cache: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the entries, k and v [B, K, C, D], and which of them are live [B, K, C] bool."""
    live = torch.arange(k_cache.shape[2], device=k_cache.device) < length[..., None]
    return k_cache.clone(), v_cache.clone(), live
