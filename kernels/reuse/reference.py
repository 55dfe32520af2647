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
from kvfx.kernels.common.attention import BLOCK, Rules, inside, rows_outermost
from kvfx.kernels.common.ruled import attend_block, shares

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
    q: Tensor, position_ids: Tensor, k_rows: Tensor, v_rows: Tensor, slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *, scale: float, window: int | None = None, chunk: int | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention [B, H, S, Dv] of q [B, H, S, D] at position_ids [B, S] over the live rows, under
    the model's `Rules`.

    A row sees `index <= position` inside window and chunk: its own position decides, never its
    place among the rows (KVShare; reuse across contexts has no bottom-right mask).
    """
    rules, count, out = Rules(slopes, sinks, softcap, window, chunk), q.shape[2], []
    index = torch.arange(count, device=q.device)
    whole = all(size is None or count <= size for size in (window, chunk))
    if rules.plain and whole and bool((position_ids == index).all()):
        # a prompt from its beginning, all inside window and chunk: plain causal attention
        keys, values = k_rows[:, :, :count], v_rows[:, :, :count]
        repeated = q.shape[1] > k_rows.shape[1]
        causal = F.scaled_dot_product_attention(
            q, keys, values, is_causal=True, scale=scale, enable_gqa=repeated
        )
        return rows_outermost(causal)
    for rows in index.split(BLOCK):
        asked = position_ids[:, rows]
        held = _reached(asked, k_rows.shape[2], rules)
        keys, values = k_rows[:, :, held], v_rows[:, :, held]
        at = torch.arange(held.start, held.stop, device=q.device)[None]
        out.append(attend_block(q[:, :, rows], keys, values, asked, at, scale, rules))
    return rows_outermost(torch.cat(out, 2))


def column_attention(
    q: Tensor, k_rows: Tensor, position_ids: Tensor, slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *, scale: float, window: int | None = None, chunk: int | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The attention that rows q [B, H, S, D] at position_ids [B, S] give to each live row, under
    the model's `Rules`: [B, K, N] fp32.

    Summed over rows and over the query heads of a KV head: the alpha of KVShare's high-deviation
    selection (arXiv 2503.16525), and of H2O.
    """
    rules = Rules(slopes, sinks, softcap, window, chunk)
    received = torch.zeros(k_rows.shape[:3], dtype=torch.float32, device=q.device)
    for rows in torch.arange(q.shape[2], device=q.device).split(WEIGHTS_BLOCK):
        asked = position_ids[:, None, rows, None]
        held = _reached(asked, k_rows.shape[2], rules)
        index = torch.arange(held.start, held.stop, device=q.device)
        keys = k_rows[:, :, held].float()
        query = q[:, :, rows].unflatten(1, (keys.shape[1], -1)).float() * scale
        score = (query.flatten(2, 3) @ keys.mT).unflatten(2, query.shape[2:4])
        seen = inside(asked, index, rules)[:, :, None]
        distance = None if rules.slopes is None else asked - index
        # a row that sees nothing is padding: its softmax is no number
        weight = shares(score, ~seen, distance, rules)
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


def _reached(asked: Tensor, count: int, rules: Rules) -> slice:
    """The live rows, of `count`, from the first to the last that any row at asked [B, S] sees."""
    end = max(int(asked.max()) + 1, 1)
    if rules.window is None and rules.chunk is None:
        return slice(0, min(end, count))
    oldest, first = int(asked.masked_fill(asked < 0, end - 1).min()), 0
    if rules.window is not None:
        first = max(first, oldest - rules.window + 1)
    if rules.chunk is not None:
        first = max(first, oldest // rules.chunk * rules.chunk)
    return slice(first, min(end, count))
