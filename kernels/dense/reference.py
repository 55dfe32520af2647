"""Dense entries: keys and values as they are, one row per entry, sorted by position.

`k_cache` and `v_cache` are [B, K, C, D]; `length` [B, K] int32 counts the live entries of a row and
head. Whatever lies beyond `length` is garbage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.attention import (
    Rules,
    attend_rows,
    attend_step,
    inside,
    step_scores,
    step_sum,
)
from kvfx.kernels.common.rows import kept_first, live_entries


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
    q: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor,
    position: Tensor | None = None, bias: Tensor | None = None, slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the live entries: [B, H, 1, Dv]. Entries never come
    after the row.

    Entries are at `position` [B, K, C] (None: at their index) and carry `bias` [B, K, C]; the
    others are `Rules`.
    """
    rules = Rules(slopes, sinks, softcap, window, chunk)
    if rules.plain and not rules.positioned and bias is None:
        return attend_step(q, k_cache, v_cache, live_entries(k_cache, length), scale)
    return _weighed(q, position_ids, k_cache, v_cache, length, position, bias, scale, rules)[0]


def attend_scored(
    q: Tensor, position_ids: Tensor, score: Tensor, k_cache: Tensor, v_cache: Tensor,
    length: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, decay: float = 1.0, softcap: float = 0.0, window: int | None = None,
    chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """What `attend` returns; score [B, K, C] fp32 becomes `decay` times itself plus the weights
    that the entries get, summed over the query heads of their KV head.
    """
    rules = Rules(slopes, sinks, softcap, window, chunk)
    out, weight = _weighed(
        q, position_ids, k_cache, v_cache, length, position, bias, scale, rules
    )  # fmt: skip
    score.copy_(score * decay + weight.sum(2))
    return out


def _weighed(
    q: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor,
    position: Tensor | None, bias: Tensor | None, scale: float, rules: Rules,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention of one row and its weights [B, K, H / K, C], under any rules."""
    live = live_entries(k_cache, length)
    entry = torch.arange(k_cache.shape[2], device=q.device)
    held = entry[None, None] if position is None else position.long()
    asked = position_ids[:, None]
    if rules.positioned or position is not None:
        live = live & inside(asked, held, rules)
    products = rules.scores(step_scores(q.float(), k_cache.float(), scale), asked - held, bias)
    weight = rules.weights(products.masked_fill(~live[:, :, None], float("-inf")))
    return step_sum(weight, v_cache.float(), live).to(q.dtype), weight


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor,
    length: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the live entries and over themselves, before they are stored: [B, H,
    S, Dv]. The optional operands are those of `attend`.
    """
    rules = Rules(slopes, sinks, softcap, window, chunk)
    live = live_entries(k_cache, length)
    held = position
    if rules.positioned and position is None:
        held = torch.arange(k_cache.shape[2], device=q.device).expand(q.shape[0], 1, -1)
    return attend_rows(q, k, v, position_ids, k_cache, v_cache, live, scale, rules, held, bias)


def load(k_cache: Tensor, v_cache: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the entries, k and v [B, K, C, D], and which of them are live [B, K, C] bool."""
    return k_cache.clone(), v_cache.clone(), live_entries(k_cache, length)
