"""Attention over entries whose visibility is known from lengths and positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# query rows attended at once: bounds the mask at BLOCK x kv_len
BLOCK = 512


def attend_step(q: Tensor, k: Tensor, v: Tensor, live: Tensor, scale: float) -> Tensor:
    """Attention of one row q [B, H, 1, D] over the live entries of k, v [B, K, T, D]; live is [B,
    K, T].

    Written as products and sums so that Inductor streams k and v once, fused with whatever produces
    them.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    q = (q * scale).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    # one query head at a time: each pass is a plain reduction over contiguous channels
    score = torch.stack([(row[:, :, None] * k).sum(-1) for row in q.unbind(2)], dim=2)
    weight = score.masked_fill(~live[:, :, None], float("-inf")).softmax(-1)
    # zero times garbage may be NaN
    v = v.masked_fill(~live[..., None], 0)
    out = torch.stack([(row[..., None] * v).sum(2) for row in weight.unbind(2)], dim=2)
    return out.reshape(batch, heads, 1, v.shape[-1])


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    k_past: Tensor,
    v_past: Tensor,
    live: Tensor,
    scale: float,
) -> Tensor:
    """Attention of S rows over the live past entries and causally over themselves: [B, H, S, Dv].

    q [B, H, S, D], k, v [B, K, S, D], position_ids [B, S]; past k, v [B, K, T, D] with live [B, K,
    T]. Padding rows (position -1) are not seen, and come out as zeros.
    """
    # zero times garbage may be NaN
    k_past, v_past = (x.masked_fill(~live[..., None], 0) for x in (k_past, v_past))
    keys, values = torch.cat((k_past, k), 2), torch.cat((v_past, v), 2)
    kv_heads, heads = k.shape[1], q.shape[1]
    past = live[:, :, None] & (position_ids >= 0)[:, None, :, None]
    out = []
    for rows in torch.arange(q.shape[2], device=q.device).split(BLOCK):
        own = visible(position_ids[:, rows], position_ids)[:, None].expand(-1, kv_heads, -1, -1)
        seen = torch.cat((past[:, :, rows], own), -1)
        out.append(masked_attention(q[:, :, rows], keys, values, seen, scale, heads // kv_heads))
    return rows_outermost(torch.cat(out, 2))


def rows_outermost(out: Tensor) -> Tensor:
    """The same attention output [B, H, S, Dv], laid out in memory as [B, S, H, Dv]."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def visible(q_position: Tensor, k_position: Tensor, window: int | None = None) -> Tensor:
    """The rule `0 <= pos_k <= pos_q` and `pos_q - pos_k < window`: [B, S], [B, T] -> [B, S, T]
    bool.
    """
    distance = q_position[:, :, None] - k_position[:, None]
    seen = (k_position >= 0)[:, None] & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, kv_repeat: int
) -> Tensor:
    """SDPA with a boolean mask per KV head, seen [B, K or 1, S, T]; rows that see nothing come out
    as zeros.
    """
    if seen.shape[1] != 1:
        seen = seen.repeat_interleave(kv_repeat, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=kv_repeat > 1
    )
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)
