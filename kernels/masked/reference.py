"""Dense entries under a mask that the model itself computes: nothing is known about who sees what.

`k_cache` and `v_cache` are [B, K, C, D]; `length` [B, K] int32 counts the live entries. Entries are
columns of the token matrix, so batches must not be padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.attention import Rules, rows_outermost
from kvfx.kernels.common.ruled import attend_by_mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, k_cache: Tensor, v_cache: Tensor,
    length: Tensor, sinks: Tensor | None = None, *, scale: float, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the entries and themselves, before they are stored: [B, H, S, Dv].

    mask is [B or 1, H or 1, S, T] with T = entries + S, boolean (True: seen) or additive; scores
    are soft-capped before it is added, sinks [H] take weight beside it.
    """
    del length
    past = mask.shape[3] - k.shape[2]
    keys = torch.cat((k_cache[:, :, :past], k), 2)
    values = torch.cat((v_cache[:, :, :past], v), 2)
    rules = Rules(sinks=sinks, softcap=softcap)
    return rows_outermost(attend_by_mask(q, keys, values, mask, scale, rules))
