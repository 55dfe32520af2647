"""Attention of a prompt over itself: exact, before anything is compressed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.kernels.common.attention import BLOCK, Rules, rows_outermost
from kvfx.kernels.common.ruled import attend_block, attend_by_mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *, scale: float, window: int | None = None, chunk: int | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Causal attention [B, H, S, Dv] of q [B, H, S, D] over k, v [B, K, S, D], under the model's
    `Rules`; padding is not seen.

    Rows are in order of position, padding (position -1) on the left. A prompt without padding
    inside window and chunk runs as one causal SDPA where there are no other rules; otherwise blocks
    of rows see just the keys that can be visible to them.
    """
    rules, rows = Rules(slopes, sinks, softcap, window, chunk), q.shape[2]
    if rules.plain and _is_causal(position_ids, rules):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1]
        )
        return rows_outermost(out)
    out = []
    for start, first in zip(range(0, rows, BLOCK), _first_keys(position_ids, rules), strict=True):
        here, reached = slice(start, start + BLOCK), slice(first, start + BLOCK)
        keys, values, held = k[:, :, reached], v[:, :, reached], position_ids[:, reached]
        asked = position_ids[:, here]
        out.append(attend_block(q[:, :, here], keys, values, asked, held, scale, rules))
    return rows_outermost(torch.cat(out, 2))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, position_ids: Tensor | None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, kv_repeat: int, window: int | None = None, chunk: int | None = None,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The raised attention: by `mask` [B or 1, H or 1, S, S] as long as it is a tensor, by
    positions once it is proven.
    """
    del kv_repeat
    if position_ids is not None:
        return attend(
            q, k, v, position_ids, slopes, sinks, scale=scale, window=window, chunk=chunk,
            softcap=softcap,
        )  # fmt: skip
    return attend_by_mask(q, k, v, mask, scale, Rules(sinks=sinks, softcap=softcap))


def _is_causal(position_ids: Tensor, rules: Rules) -> bool:
    """Whether each row sees all rows up to itself: no padding, one window, one chunk."""
    rows = position_ids.shape[1]
    if any(size is not None and rows > size for size in (rules.window, rules.chunk)):
        return False
    seen = position_ids >= 0
    if rules.chunk is not None:
        seen = seen & (position_ids // rules.chunk == position_ids[:, :1] // rules.chunk)
    return bool(seen.all())


def _first_keys(position_ids: Tensor, rules: Rules) -> list[int]:
    """The first row that each block of rows can see: no row is nearer than its position says."""
    starts = list(range(0, position_ids.shape[1], BLOCK))
    back = starts
    if rules.chunk is not None:
        # what the first row of a block sees of its chunk; padding sees nothing
        back = (position_ids[:, ::BLOCK].clamp(min=0) % rules.chunk).amax(0).tolist()
    if rules.window is not None:
        back = [min(rows, rules.window - 1) for rows in back]
    return [max(start - rows, 0) for start, rows in zip(starts, back, strict=True)]
