"""Rows computed at any positions, over live rows where index = position: what reuse is made of.

Live rows k_rows [B, K, N, D], v_rows [B, K, N, Dv] hold one rotated key and one value per position
of a prompt, some computed in this context and some not. Position -1 marks padding: it is neither
written nor seen, and comes out as zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.common.attention import (
    BLOCK,
    Rules,
    inside,
    masked_attention,
    rows_outermost,
)

# query rows whose weights exist at once
WEIGHTS_BLOCK = 128
NORMS = {"l1": torch.abs, "l2": torch.square}


def scatter_rows(
    k: Tensor, v: Tensor, position_ids: Tensor, k_rows: Tensor, v_rows: Tensor
) -> None:
    """Write rows k [B, K, S, D], v [B, K, S, Dv] over the live rows at position_ids [B, S]."""
    batch, row = (position_ids >= 0).nonzero(as_tuple=True)
    position = position_ids[batch, row]
    k_rows[batch, :, position] = k[batch, :, row]
    v_rows[batch, :, position] = v[batch, :, row]


def attend_rows(
    q: Tensor,
    position_ids: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention [B, H, S, Dv] of q [B, H, S, D] at position_ids [B, S] over the live rows.

    A row sees `index <= position`, and `position - index < window` where there is a window: its own
    position decides, never its place among the rows (KVShare; reuse across contexts has no
    bottom-right mask).
    """
    count, repeat, out = q.shape[2], q.shape[1] // k_rows.shape[1], []
    index = torch.arange(count, device=q.device)
    if (window is None or count <= window) and bool((position_ids == index).all()):
        # a prompt from its beginning, all inside the window: plain causal attention
        keys, values = k_rows[:, :, :count], v_rows[:, :, :count]
        whole = F.scaled_dot_product_attention(
            q, keys, values, is_causal=True, scale=scale, enable_gqa=repeat > 1
        )
        return rows_outermost(whole)
    for rows in index.split(BLOCK):
        asked = position_ids[:, rows]
        held = _reached(asked, k_rows.shape[2], window)
        seen = _seen(asked, held, window)[:, None]
        keys, values = k_rows[:, :, held], v_rows[:, :, held]
        out.append(masked_attention(q[:, :, rows], keys, values, seen, scale, repeat))
    return rows_outermost(torch.cat(out, 2))


def column_attention(
    q: Tensor, k_rows: Tensor, position_ids: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """The attention that rows q [B, H, S, D] at position_ids [B, S] give to each live row: [B, K,
    N] fp32.

    Summed over rows and over the query heads of a KV head: the alpha of KVShare's high-deviation
    selection (arXiv 2503.16525), and of H2O.
    """
    received = torch.zeros(k_rows.shape[:3], dtype=torch.float32, device=q.device)
    for rows in torch.arange(q.shape[2], device=q.device).split(WEIGHTS_BLOCK):
        asked = position_ids[:, rows]
        held = _reached(asked, k_rows.shape[2], window)
        seen = _seen(asked, held, window)[:, None, None]
        keys = k_rows[:, :, held].float()
        query = q[:, :, rows].unflatten(1, (keys.shape[1], -1)).float() * scale
        score = (query.flatten(2, 3) @ keys.mT).unflatten(2, query.shape[2:4])
        weight = score.masked_fill_(~seen, float("-inf")).softmax(-1)
        # a row that sees nothing is padding: its softmax is no number
        weight = weight.masked_fill_(~seen.any(-1, keepdim=True), 0.0)
        received[:, :, held] += weight.sum((2, 3))
    return received


def row_deviation(new: Tensor, old_rows: Tensor, position_ids: Tensor, *, norm: str) -> Tensor:
    """How far rows new [B, K, S, D] are from the live rows [B, K, N, D] at position_ids [B, S]: [B,
    K, S] fp32, zero for padding.

    Summed over channels: absolute differences ("l1", KVShare) or squares ("l2", CacheBlend, arXiv
    2405.16444). Raises UnsupportedShape for another norm.
    """
    if norm not in NORMS:
        raise UnsupportedShape(f"row_deviation: norm={norm!r}: choose one of {', '.join(NORMS)}")
    old = take_rows(old_rows, position_ids, axis=2)
    deviation = NORMS[norm](new.float() - old.float()).sum(-1)
    return deviation.masked_fill((position_ids < 0)[:, None], 0.0)


def weigh_rows(deviation: Tensor, received: Tensor, position_ids: Tensor) -> Tensor:
    """Each row's share of a bound on the error of the attention's output: [B, S] fp32.

    The product of deviation [B, K, S] and the attention received [B, K, N] at position_ids [B, S],
    summed over KV heads: `sum_i |do_i|_1 <= sum_j alpha_j |dv_j|_1` (KVShare's DHD score).
    """
    return (deviation * take_rows(received, position_ids, axis=2)).sum(1)


def choose_rows(score: Tensor, must: Tensor, may: Tensor, slots: Tensor) -> Tensor:
    """Indices [B, n] int64, ascending, of all rows in `must` and the best by score among `may`.

    score is [B, S], must and may [B, S] bool; slots [n] tells how many, all in all: at least as
    many as `must` has, which is the caller's duty. Equal scores go to the smaller index, a score
    that is no number counts as the largest. -1 stands at the end where fewer rows exist.
    """
    batch, rows = score.shape
    ranked = torch.nan_to_num(score, nan=float("inf")).argsort(dim=1, descending=True, stable=True)
    wanted = must.long() * 2 + may.long()
    order = wanted.gather(1, ranked).argsort(dim=1, descending=True, stable=True)
    best = ranked.gather(1, order)[:, : slots.shape[0]]
    best = best.masked_fill(wanted.gather(1, best) == 0, rows).sort(1).values
    chosen = best.new_full((batch, slots.shape[0]), -1)
    chosen[:, : best.shape[1]] = best.masked_fill(best == rows, -1)
    return chosen


def take_rows(x: Tensor, rows: Tensor, *, axis: int) -> Tensor:
    """The rows [B, n] of x [B, ...] along `axis`; where rows is -1 it is row 0, which nobody sees
    at position -1.
    """
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.movedim(axis, 1)[batch, rows.clamp(min=0)].movedim(1, axis)


def take_positions(position_ids: Tensor, rows: Tensor) -> Tensor:
    """The positions [B, n] of rows [B, n] among position_ids [B, S]; -1 where rows is -1."""
    return position_ids.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1)


def _reached(asked: Tensor, count: int, window: int | None) -> slice:
    """The live rows, of `count`, from the first to the last that any row at asked [B, S] sees."""
    end = max(int(asked.max()) + 1, 1)
    if window is None:
        return slice(0, min(end, count))
    oldest = int(asked.masked_fill(asked < 0, end - 1).min())
    return slice(max(oldest - window + 1, 0), min(end, count))


def _seen(asked: Tensor, held: slice, window: int | None) -> Tensor:
    """Which of the live rows T in `held` the rows at asked [B, S] see: [B, S, T] bool."""
    index = torch.arange(held.start, held.stop, device=asked.device)
    return inside(asked[:, :, None], index, Rules(window=window))
