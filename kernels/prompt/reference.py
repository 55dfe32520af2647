"""Attention of a prompt over itself: exact, before anything is compressed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.kernels.common.attention import BLOCK, masked_attention, rows_outermost, visible


def attend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention [B, H, S, Dv] of q [B, H, S, D] over k, v [B, K, S, D]; padding is not seen.

    Rows are in order of position, padding (position -1) on the left. A prompt without padding
    inside the window runs as one causal SDPA; otherwise blocks of rows see just the keys that can
    be visible to them.
    """
    rows, kv_repeat = q.shape[2], q.shape[1] // k.shape[1]
    inside = window is None or rows <= window
    if inside and bool((position_ids >= 0).all()):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=kv_repeat > 1
        )
        return rows_outermost(out)
    out = []
    for start in range(0, rows, BLOCK):
        end = min(start + BLOCK, rows)
        first = 0 if window is None else max(0, start - window + 1)
        seen = visible(position_ids[:, start:end], position_ids[:, first:end], window)[:, None]
        part = masked_attention(
            q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], seen, scale, kv_repeat
        )
        out.append(part)
    return rows_outermost(torch.cat(out, 2))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    scale: float,
    kv_repeat: int,
    window: int | None = None,
) -> Tensor:
    """The raised attention: by `mask` [B, H or 1, S, S] as long as it is a tensor, by positions
    once it is proven.
    """
    if position_ids is not None:
        return attend(q, k, v, position_ids, scale, window)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=kv_repeat > 1
    )
