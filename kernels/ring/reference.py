"""The newest W entries of a sliding-window layer, in a ring: nothing that the model can still see
is dropped.

`k_cache` and `v_cache` are [B, K, C, D] with C <= W; `position` [B, C] int32 is -1 where nothing
was written yet;
`length` [B, 1] int32 counts the rows ever appended. The t-th row lives in slot t mod C: a capacity
below the window is only used as long as nothing had to wrap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.attention import BLOCK, Rules, attend_step, inside, rows_outermost
from kvfx.kernels.common.rows import kept_first
from kvfx.kernels.common.ruled import attend_block, attend_ruled_step


def store(
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    length: Tensor,
    window: int,
) -> None:
    """Write the newest rows of k, v [B, K, S, D] that are not padding; position_ids is [B, S]."""
    del window
    capacity = k_cache.shape[2]
    order, count = kept_first((position_ids >= 0)[:, None])
    order, count = order[:, 0], count[:, 0]
    rank = torch.arange(order.shape[1], device=k.device)
    write = (rank < count[:, None]) & (rank >= count[:, None] - capacity)
    b, rank = write.nonzero(as_tuple=True)
    row, slot = order[b, rank], (length.long()[b, 0] + rank) % capacity
    k_cache[b, :, slot] = k[b, :, row]
    v_cache[b, :, slot] = v[b, :, row]
    position[b, slot] = position_ids[b, row].to(position.dtype)
    length += count[:, None].to(length.dtype)


def append(
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    length: Tensor,
    window: int,
) -> None:
    """Write one row k, v [B, K, 1, D] over the oldest entry; padding (position -1) is written but
    never seen.
    """
    del window
    b = torch.arange(k.shape[0], device=k.device)
    h = torch.arange(k.shape[1], device=k.device)
    slot = length.long()[:, 0] % k_cache.shape[2]
    k_cache.index_put_((b[:, None], h, slot[:, None]), k[:, :, 0])
    v_cache.index_put_((b[:, None], h, slot[:, None]), v[:, :, 0])
    position.index_put_((b, slot), position_ids[:, 0].to(position.dtype))
    length.add_((position_ids >= 0).to(length.dtype))


def attend(
    q: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor,
    length: Tensor, slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, window: int, softcap: float = 0.0, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the entries inside its window, under the model's
    `Rules`: [B, H, 1, Dv].
    """
    del length
    rules = Rules(slopes, sinks, softcap, window, chunk)
    held = position[:, None]
    live = inside(position_ids[:, None], held, rules).expand(-1, k_cache.shape[1], -1)
    if rules.plain:
        return attend_step(q, k_cache, v_cache, live, scale)
    distance = position_ids[:, None] - held
    return attend_ruled_step(q, k_cache, v_cache, live, distance, scale, rules)


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor,
    position: Tensor, length: Tensor, slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, window: int, softcap: float = 0.0, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the ring and over themselves, before they are stored: [B, H, S,
    Dv].
    """
    del length
    rules = Rules(slopes, sinks, softcap, window, chunk)
    keys, values = torch.cat((k_cache, k), 2), torch.cat((v_cache, v), 2)
    held = torch.cat((position.long(), position_ids), 1)
    out = []
    for start in range(0, q.shape[2], BLOCK):
        rows = slice(start, start + BLOCK)
        asked = position_ids[:, rows]
        out.append(attend_block(q[:, :, rows], keys, values, asked, held, scale, rules))
    return rows_outermost(torch.cat(out, 2))
