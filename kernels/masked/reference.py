"""Dense entries under a mask that the model itself computes: nothing is known about who sees what.

`k_cache` and `v_cache` are [B, K, C, D]; `length` [B, K] int32 counts the live entries. Entries are
columns of the token matrix, so batches must not be padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.kernels.common.attention import rows_outermost


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    scale: float,
) -> Tensor:
    """Attention of S rows over the entries and themselves, before they are stored: [B, H, S, Dv].

    mask is [B or 1, H or 1, S, T] with T = entries + S, boolean (True: seen) or additive.
    """
    del length
    past = mask.shape[3] - k.shape[2]
    keys = torch.cat((k_cache[:, :, :past], k), 2)
    values = torch.cat((v_cache[:, :, :past], v), 2)
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return rows_outermost(out)
