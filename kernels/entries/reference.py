"""What is known about each entry besides its key and value: numbers that move as entries do.

`entries` [B, K, C] holds one number per entry, in the order of the cache and of any dtype (scores
fp32, positions int32); beyond the live length it is zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.kernels.common.rows import kept_first, live_entries


def store(x: Tensor, keep: Tensor, length: Tensor, entries: Tensor) -> None:
    """Write the numbers x [B, K, S] of the kept rows behind the live ones; length [B, K] is that
    before the rows are stored.
    """
    order, count = kept_first(keep)
    rank = torch.arange(entries.shape[2], device=x.device) - length.long()[..., None]
    here = (rank >= 0) & (rank < count[..., None])
    row = order.gather(2, rank.clamp(0, x.shape[2] - 1))
    entries.copy_(torch.where(here, x.gather(2, row), entries))


def append(x: Tensor, keep: Tensor, length: Tensor, entries: Tensor) -> None:
    """Write the number x [B, K, 1] of one row behind the live ones, if it is kept; length [B, K] is
    that before the row is stored.
    """
    b = torch.arange(x.shape[0], device=x.device)[:, None]
    h = torch.arange(x.shape[1], device=x.device)
    # what is not kept lies beyond the live length, where numbers are zero
    number = torch.where(keep, x, 0).to(entries.dtype)[..., 0]
    entries.index_put_((b, h, length.long()), number)


def extend(x: Tensor, keep: Tensor, length: Tensor, entries: Tensor) -> None:
    """Add the first C numbers of x [B, K, C + S] to what live entries have, and store the others,
    those of new rows.
    """
    capacity = entries.shape[2]
    live = live_entries(entries, length)
    entries.add_(x[..., :capacity].masked_fill(~live, 0))
    store(x[..., capacity:], keep, length, entries)


def compact(keep: Tensor, entries: Tensor) -> None:
    """Move the numbers of kept entries, keep [B, K, C] bool, to the front; zeros follow."""
    order, count = kept_first(keep)
    entries.copy_(entries.gather(2, order).masked_fill(~live_entries(entries, count), 0))


def snapshot(x: Tensor) -> Tensor:
    """What x holds now: a copy."""
    return x.clone()


def share_heads(score: Tensor) -> Tensor:
    """The mean score over KV heads, for methods that keep the same tokens in all of them: [B, K,
    S].
    """
    return score.mean(1, keepdim=True).expand_as(score)


def smooth(score: Tensor, kernel: int, mode: str) -> Tensor:
    """Scores [B, K, S] pooled over `kernel` neighbours (odd), by their "mean" or "max"; beyond the
    ends a mean sees zeros.
    """
    pool = F.avg_pool1d if mode == "mean" else F.max_pool1d
    return pool(score, kernel, stride=1, padding=kernel // 2)
