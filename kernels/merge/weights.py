"""Weights of merged rows that both backends share: the Gaussian kernel, and the draws of CaM."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvfx.errors import PolicyError

SIGMAS = ("dist", "fixed", "rms", "two_step", "literal")
# the published formula is its own argument: it converges well before
ROUNDS = 64
MASK = 0xFFFFFFFF


def check_sigma(sigma: str) -> None:
    """Raise PolicyError for a mode that does not exist."""
    if sigma not in SIGMAS:
        raise PolicyError(f"merge_gaussian: sigma is one of {', '.join(SIGMAS)}, not {sigma!r}")


def gauss(
    distance: Tensor, set_sum: Callable[[Tensor], Tensor], sigma: str, width: float
) -> Tensor:
    """The Gaussian kernel of each row's distance from its set's leader, [B, K, T]; 1 where all
    distances are 0.

    set_sum(x) gives every row the sum of x over its set.
    """
    check_sigma(sigma)
    size = set_sum(torch.ones_like(distance)).clamp(min=1.0)
    spread = math.sqrt(2.0) * size
    if sigma == "fixed":
        return kernel(distance, torch.full_like(distance, width))
    if sigma == "dist":
        return kernel(distance, set_sum(distance) / spread)
    if sigma == "literal":
        sized = torch.full_like(distance, 1.0 / math.sqrt(2.0))
        for _ in range(ROUNDS):
            sized = set_sum(kernel(distance, sized)) / spread
        return kernel(distance, sized)
    sized = (set_sum(distance.square()) / size).sqrt()
    if sigma == "two_step":
        sized = set_sum(kernel(distance, sized)) / spread
    return kernel(distance, sized)


def kernel(distance: Tensor, sigma: Tensor) -> Tensor:
    """exp(-d^2 / (2 sigma^2)), and 1 where sigma is 0: all distances are."""
    ratio = distance / torch.where(sigma > 0, sigma, 1.0)
    return torch.exp(-0.5 * ratio.square())


def draws(position: Tensor, seed: int) -> Tensor:
    """One number in [0, 1) per KV head and position [B, K, T], the same wherever it is drawn."""
    heads = torch.arange(position.shape[1], device=position.device)[:, None]
    # odd numbers keep heads and seeds apart: one that is shifted is not another one's neighbour
    salt = _hash((heads * 0x9E3779B1 + seed) & MASK)
    # 24 bits are what fp32 can hold
    return (_hash(salt ^ _hash(position.long() & MASK)) >> 8).float() * 2.0**-24


def _hash(x: Tensor) -> Tensor:
    """A 32-bit mix (Wellons' lowbias32) of 32-bit numbers in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def ahead_shares(
    keep: Tensor, live: Tensor, score: Tensor, position: Tensor | None, order: Tensor, *,
    targets: int, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What each row gives to each of the next `targets` kept rows, [B, K, T] fp32 (0: nothing), and
    how many kept rows stand before it.

    An evicted row gives 1 / (its number of targets) with a probability of its score over their mean
    score. `order` has the kept rows first.
    """
    rank = keep.long().cumsum(-1)
    kept = rank[..., -1:]
    index = torch.arange(keep.shape[-1], device=keep.device)
    reference = score.float().gather(-1, order).masked_fill(index >= kept, 0.0)
    reference = windowed(reference[..., None].flip(2), targets).flip(2)[..., 0]
    before = (rank - keep.long()).clamp(max=keep.shape[-1] - 1)
    targeted = (kept - before).clamp(min=0, max=targets)
    chance = score.float() * targeted / reference.gather(-1, before)
    chance = chance.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)
    at = live.long().cumsum(-1) - 1 if position is None else position
    hit = live & ~keep & (targeted > 0) & (draws(at, seed) < chance)
    return torch.where(hit, 1.0 / targeted.clamp(min=1), 0.0), before


def windowed(x: Tensor, width: int) -> Tensor:
    """Sums of each row of x [B, K, T, D] and the `width` - 1 rows before it, in log2(width) steps:
    no difference of long sums.
    """
    total, span, size, offset = torch.zeros_like(x), x, 1, 0
    while width >= size:
        if width & size:
            total = total + _later(span, offset)
            offset += size
        span = span + _later(span, size)
        size *= 2
    return total


def _later(x: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, rows, 0))[:, :, : x.shape[2]]
