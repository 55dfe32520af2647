"""How much attention entries get: what eviction ranks them by.

Rows are in order of position; a live row sees the live rows up to itself. `live` [B, K, T] is False
for padding, which neither gives nor gets attention. Queries [B, H, S, D] belong to the last S of
the T rows: to all of a prompt, or to a turn behind the entries of a cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.kernels.common.attention import Rules
from kvfx.kernels.common.rotation import angles, rotate, turned_by
from kvfx.kernels.common.rows import places
from kvfx.kernels.common.ruled import shares

# query rows whose weights exist at once
BLOCK = 128


def window(
    q: Tensor, k: Tensor, live: Tensor, position: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, window: int, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The attention that the last `window` rows give to each row: [B, K, T] fp32, for q [B, H, S,
    D], k [B, K, T, D].

    Summed over rows and averaged over the query heads of a KV head (SnapKV). Attention is the
    model's: softcap, sinks [H] and slopes [H] are those of `Rules`, for rows at `position` [B, K,
    T] (None: their rank among live rows).
    """
    first = max(k.shape[2] - q.shape[2], k.shape[2] - window)
    received = _received(q, k, live, position, scale, first, Rules(slopes, sinks, softcap))
    return received / (q.shape[1] // k.shape[1])


def columns(
    q: Tensor, k: Tensor, live: Tensor, position: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The attention that all rows of q give to each row: [B, K, T] fp32, for q [B, H, S, D], k [B,
    K, T, D].

    Summed over rows and over the query heads of a KV head (H2O); decoded rows go on adding. The
    optional operands are those of `window`.
    """
    first, rules = k.shape[2] - q.shape[2], Rules(slopes, sinks, softcap)
    return _received(q, k, live, position, scale, first, rules)


def _received(
    q: Tensor, k: Tensor, live: Tensor, position: Tensor | None, scale: float, first: int,
    rules: Rules,
) -> Tensor:  # fmt: skip
    """Attention weights summed over the rows from `first` on and over grouped query heads."""
    received = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    index = torch.arange(k.shape[2], device=k.device)
    ahead, keys = k.shape[2] - q.shape[2], k.float().mT
    held, distance = places(live, position) if rules.slopes is not None else None, None
    for rows in index[first:].split(BLOCK):
        asked = q[:, :, rows - ahead].unflatten(1, (k.shape[1], -1)).float()
        score = (asked.flatten(2, 3) * scale) @ keys
        unseen = ~(live[:, :, None, None] & (index <= rows[:, None]))
        if held is not None:
            distance = held[:, :, rows, None] - held[:, :, None]
        weight = shares(score.unflatten(2, asked.shape[2:4]), unseen, distance, rules)
        # a row that sees nothing is padding: its softmax is no number
        weight = weight.masked_fill_(~live[:, :, None, rows, None], 0.0)
        received += weight.sum((2, 3))
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


def average(score: Tensor, live: Tensor, position: Tensor | None) -> Tensor:
    """Accumulated attention, score [B, K, T], per row that saw the token (WeightedKV): those from
    its own position [B, K, T] (None: its rank among live rows) to the newest one.
    """
    own = places(live, position)
    newest = own.masked_fill(~live, -1).amax(-1, keepdim=True)
    saw = (newest - own + 1).masked_fill(~live, 1)
    return (score / saw).masked_fill(~live, 0.0)


def query_statistics(
    q: Tensor, position_ids: Tensor, frequencies: Tensor, *, style: str, sinks: int, future: int
) -> tuple[Tensor, Tensor]:
    """What the next `future` rows will ask, as far as q [B, H, S, D] tells: the mean [B, H, D] and
    covariance [B, H, D, D] of queries, fp32 (Expected Attention).

    They are those of q before its rotation, over rows at position_ids [B, S] from `sinks` on (all
    rows but padding, where there is none), turned by the mean rotation of the future positions.
    """
    asked = position_ids >= 0
    late = position_ids >= max(sinks, 0)
    rows = torch.where(late.any(1, keepdim=True), late, asked)[:, None, :, None]
    back = -position_ids[:, None]
    q = rotate(q.float(), back, frequencies, style).masked_fill(~rows, 0.0)
    number = rows.sum(2).clamp(min=1)
    mean = q.sum(2) / number
    apart = (q - mean[:, :, None]).masked_fill(~rows, 0.0)
    covariance = apart.mT @ apart / number[..., None]

    # R(next + i) = R(next) R(i), and the mean of R(i) is the same for all rows of the batch
    width = q.shape[3]
    angle = angles(torch.arange(future, device=q.device), frequencies)
    unit = torch.eye(width, device=q.device)[None, None]
    turn = turned_by(unit, angle.cos().mean(0), angle.sin().mean(0), style)[0]
    following = position_ids.amax(1)[:, None, None] + 1
    mean = rotate((mean @ turn)[:, :, None], following, frequencies, style)[:, :, 0]
    covariance = turn.mT @ covariance @ turn
    for _ in range(2):
        following_rows = following.expand(-1, -1, width)
        covariance = rotate(covariance, following_rows, frequencies, style).mT
    return mean, covariance.contiguous()


def expected(
    mean: Tensor, covariance: Tensor, k: Tensor, v: Tensor, live: Tensor, *,
    scale: float, epsilon: float, spread: bool, value_norm: bool,
) -> Tensor:  # fmt: skip
    """The attention that normally distributed queries give to each row, [B, K, T] fp32 (Expected
    Attention), for their mean [B, H, D] and covariance [B, H, D, D], k [B, K, T, D], v [B, K, T,
    Dv].

    Averaged over the query heads of a KV head. `spread` takes the covariance into account;
    with `value_norm`, `epsilon` is added and the length of the row's value multiplied.
    """
    kv_heads = k.shape[1]
    mean, covariance = (x.float().unflatten(1, (kv_heads, -1)) for x in (mean, covariance))
    logits = []
    for keys in k.float().masked_fill(~live[..., None], 0.0).split(BLOCK, 2):
        logit = scale * torch.einsum("bktd,bkmd->bkmt", keys, mean)
        if spread:
            turned = torch.einsum("bktd,bkmde->bkmte", keys, covariance)
            logit += scale**2 / 2 * torch.einsum("bkmte,bkte->bkmt", turned, keys)
        logits.append(logit)
    logit = torch.cat(logits, 3).masked_fill(~live[:, :, None], float("-inf"))
    score = logit.softmax(3).mean(2)
    if value_norm:
        score = (score + epsilon) * v.float().norm(dim=-1)
    return score.masked_fill(~live, 0.0)
