"""How much attention entries get: what eviction ranks them by.

Rows are in order of position; a live row sees the live rows up to itself. `live` [B, K, T] is False
for padding, which neither gives nor gets attention. Queries [B, H, S, D] belong to the last S of
the T rows: to all of a prompt, or to a turn behind the entries of a cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# query rows whose weights exist at once
BLOCK = 128


def window(q: Tensor, k: Tensor, live: Tensor, *, scale: float, window: int) -> Tensor:
    """The attention that the last `window` rows give to each row: [B, K, T] fp32, for q [B, H, S,
    D], k [B, K, T, D].

    Summed over rows and averaged over the query heads of a KV head (SnapKV).
    """
    first = max(k.shape[2] - q.shape[2], k.shape[2] - window)
    return _received(q, k, live, scale, first) / (q.shape[1] // k.shape[1])


def columns(q: Tensor, k: Tensor, live: Tensor, *, scale: float) -> Tensor:
    """The attention that all rows of q give to each row: [B, K, T] fp32, for q [B, H, S, D], k [B,
    K, T, D].

    Summed over rows and over the query heads of a KV head (H2O); decoded rows go on adding.
    """
    return _received(q, k, live, scale, k.shape[2] - q.shape[2])


def _received(q: Tensor, k: Tensor, live: Tensor, scale: float, first: int) -> Tensor:
    """Attention weights summed over the rows from `first` on and over grouped query heads."""
    received = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    index = torch.arange(k.shape[2], device=k.device)
    ahead = k.shape[2] - q.shape[2]
    for rows in index[first:].split(BLOCK):
        asked = q[:, :, rows - ahead].unflatten(1, (k.shape[1], -1)).float()
        score = torch.einsum("bkmsd,bktd->bkmst", asked * scale, k.float())
        seen = live[:, :, None, None] & (index <= rows[:, None])
        weight = score.masked_fill(~seen, float("-inf")).softmax(-1)
        # a row that sees nothing is padding: its softmax is no number
        given = weight.masked_fill(~live[:, :, None, rows, None], 0.0)
        received += given.sum((2, 3))
    return received


def key_norm(k: Tensor, live: Tensor) -> Tensor:
    """Minus the length of each key, [B, K, T] fp32 (KNorm): short keys draw attention."""
    return -k.float().masked_fill(~live[..., None], 0.0).norm(dim=-1)


def key_difference(k: Tensor, live: Tensor) -> Tensor:
    """Minus the cosine between each key and the mean direction of the live ones, [B, K, T] fp32
    (KeyDiff).
    """
    direction = F.normalize(k.float().masked_fill(~live[..., None], 0.0), dim=-1)
    mean = direction.sum(2, keepdim=True) / live.sum(2)[..., None, None].clamp(min=1)
    return -(direction * F.normalize(mean, dim=-1)).sum(-1)
