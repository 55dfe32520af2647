"""Latent rows: what keys and values of all heads are computed from, one row per entry.

`latent` is [B, 1, C, W]; `length` [B, K] int32 counts the live entries of a row, the same for every
KV head. Whatever lies beyond `length` is garbage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.rows import kept_first


def store(rows: Tensor, keep: Tensor, latent: Tensor, length: Tensor) -> None:
    """Write the kept ones of rows [B, 1, S, W] behind the live entries; keep is [B, K, S] bool,
    equal for all heads.
    """
    order, count = kept_first(keep[:, 0])
    order = order[:, : latent.shape[2]]
    index = torch.arange(order.shape[-1], device=rows.device)
    slot = length[:, :1].long() + index
    b = torch.arange(rows.shape[0], device=rows.device)[:, None]
    live = index < count[:, None]
    b, slot, order = (x.expand_as(live)[live] for x in (b, slot, order))
    latent[b, 0, slot] = rows[b, 0, order]
    length += count[:, None].to(length.dtype)


def append(rows: Tensor, keep: Tensor, latent: Tensor, length: Tensor) -> None:
    """Write one row [B, 1, 1, W] behind the live entries; a row that is not kept stays beyond the
    live length.
    """
    b = torch.arange(rows.shape[0], device=rows.device)
    zero = torch.zeros_like(b)
    latent.index_put_((b, zero, length[:, 0].long()), rows[:, 0, 0])
    length.add_(keep[..., 0].to(length.dtype))
