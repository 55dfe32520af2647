"""What a calibration measures at one attention: where its weight lies, how its entropies compare,
and what dropping or rounding tokens would do to its output.

The last `rows` rows of a prompt stand for those that will ask: they see themselves as they are, and
the *past*, the tokens before them, as a cache would hold it. A prompt has no padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.errors import UnsupportedShape

# the largest finite and the smallest positive fp16 number
LARGEST = 65504.0
SMALLEST = 2.0**-24


def probe(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, *,
    scale: float, rows: int, steps: int, fractions: Sequence[float], bits: Sequence[int],
    group_size: int, rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Eight statistics of causal attention of q [B, H, T, D] over k, v [B, K, T, D], whose columns
    sum up to `columns` [B, K, T].

    They are: the retention [B, steps] of the mean over heads, of the last rows alone, and [B, K,
    steps] of each KV head; entropy and variance [B] of what the last rows give to the past; the
    matrix entropy [B] of keys; the error of the last rows' output when a fraction of the past stays
    [B, fractions], and when it is quantized [B, pairs of bits], bits of keys outermost.
    """
    past = k.shape[2] - rows
    if past < 1:
        raise UnsupportedShape(f"probe: {k.shape[2]} tokens are no more than the {rows} that ask")
    k, v = k.float(), v.float()
    asked = q[:, :, past:].unflatten(1, (k.shape[1], -1)).float() * scale
    score = _scores(asked, k)
    weight = score.softmax(-1)
    out = _summed(weight, v)
    to_past = weight[..., :past]
    dropped = [
        _error(_summed(_only(score, columns[..., :past], fraction).softmax(-1), v), out)
        for fraction in fractions
    ]
    # rows of a group that is not full are exact
    full = past // group_size * group_size
    keys = [_scores(asked, _coarse_keys(k, full, each, group_size)).softmax(-1) for each in bits]
    values = [_coarse_values(v, full, each, group_size) for each in bits]
    rounded = [_error(_summed(given, held), out) for given in keys for held in values]
    return (
        retention(columns.double().mean(1), steps),
        retention(weight.double().sum(3).mean((1, 2)), steps),
        retention(columns, steps),
        -torch.xlogy(to_past, to_past).sum(-1).mean((1, 2, 3)),
        to_past.var(3).sum(-1).mean((1, 2)),
        matrix_entropy(k, rank).mean(1),
        torch.stack(dropped, 1),
        torch.stack(rounded, 1),
    )


def retention(score: Tensor, steps: int) -> Tensor:
    """The share of score [..., T] that its best g / steps tokens hold, rounded up to whole tokens,
    for g = 1 ... steps: [..., steps] fp64.
    """
    total = score.double().sort(-1, descending=True).values.cumsum(-1)
    grid = torch.arange(1, steps + 1, device=score.device) * score.shape[-1]
    tokens = (grid + steps - 1) // steps
    return total[..., tokens - 1] / total[..., -1:]


def matrix_entropy(x: Tensor, rank: int) -> Tensor:
    """The entropy of the `rank` largest eigenvalues of the covariance of x [..., T, D], as a
    fraction of log D (UNComp): [...].

    Tokens are centred, then scaled to unit length.
    """
    unit = F.normalize(x - x.mean(-2, keepdim=True), dim=-1).double()
    covariance = unit.mT @ unit / x.shape[-2]
    values = torch.linalg.eigvalsh(covariance).clamp(min=0.0)
    share = values / values.sum(-1, keepdim=True).clamp(min=SMALLEST)
    largest = share[..., -rank:]
    return -(torch.xlogy(largest, largest).sum(-1) / math.log(x.shape[-1])).float()


def similarity(before: Tensor, after: Tensor) -> Tensor:
    """The mean cosine between the rows of two states [B, S, hidden]: [B] fp32."""
    return F.cosine_similarity(before.float(), after.float(), dim=-1).mean(1)


def _scores(asked: Tensor, k: Tensor) -> Tensor:
    """Scores [B, K, M, R, T] of the last R rows, already scaled; the future is minus infinity."""
    index = torch.arange(k.shape[2], device=k.device)
    seen = index <= index[-asked.shape[3] :, None]
    return torch.einsum("bkmrd,bktd->bkmrt", asked, k).masked_fill(~seen, float("-inf"))


def _summed(weight: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bkmrt,bktd->bkmrd", weight, v)


def _only(score: Tensor, importance: Tensor, fraction: float) -> Tensor:
    """Scores without those of the past, importance [B, K, P], but its best fraction per head."""
    past = importance.shape[-1]
    order = importance.argsort(dim=-1, descending=True, stable=True)
    kept = order.argsort(dim=-1) < math.ceil(fraction * past)
    seen = F.pad(kept, (0, score.shape[-1] - past), value=True)
    return score.masked_fill(~seen[:, :, None, None], float("-inf"))


def _coarse_keys(k: Tensor, full: int, bits: int, group_size: int) -> Tensor:
    """Keys whose first `full` tokens are quantized per channel, in groups of tokens."""
    groups = k[:, :, :full].unflatten(2, (-1, group_size))
    return torch.cat((quantized(groups, bits, 3).flatten(2, 3), k[:, :, full:]), 2)


def _coarse_values(v: Tensor, full: int, bits: int, group_size: int) -> Tensor:
    """Values whose first `full` tokens are quantized per token, in groups of channels."""
    groups = v[:, :, :full].split(group_size, -1)
    coarse = torch.cat([quantized(group, bits, 3) for group in groups], -1)
    return torch.cat((coarse, v[:, :, full:]), 2)


def quantized(x: Tensor, bits: int, dim: int) -> Tensor:
    """What codes of `bits` bits say about x, fp32, with one fp16 scale and zero per group along
    `dim` (KIVI's quantizer).
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(SMALLEST, LARGEST).half().float()
    zero = low.clamp(-LARGEST, LARGEST).half().float()
    return ((x - zero) / scale).clamp(0, 2**bits - 1).round() * scale + zero


def _error(found: Tensor, out: Tensor) -> Tensor:
    """How far outputs [B, K, M, R, D] are from `out`, relative to its length: [B]."""
    return (found - out).flatten(1).norm(dim=1) / out.flatten(1).norm(dim=1)
