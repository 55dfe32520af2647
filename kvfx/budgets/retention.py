"""Curves of retained score, and what they ask for: an equal part in all layers under a budget
(PrefixKV from a calibration), or a fixed part without one (ZipVL).

A curve [G] says which part of a layer's score the best 1/G, 2/G, ... of its tokens hold; between
those it is a straight line.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.budgets.prefix import bisected_counts
from kvfx.budgets.shares import mean_one

# the published search ends when fewer tokens than these are missing or too many
TOLERANCE = 5


def prefix_shares(retention: Tensor, fraction: float) -> tuple[float, ...]:
    """Shares of layers under which every layer keeps the same part of its score, `fraction` of the
    tokens in all: the mean over prompts of retention [P, L, G].

    A larger fraction never lowers share * fraction of a layer.
    """
    return mean_one(torch.stack([equal_retention(curves, fraction) for curves in retention]))


def bisected_shares(retention: Tensor, fraction: float, tokens: int) -> tuple[float, ...]:
    """The same by the published search, over prompts of so many tokens: halving a common threshold
    until no more than 4 tokens are missing or too many.
    """
    places = torch.linspace(0, 1, tokens + 1, dtype=torch.float64)
    counts = []
    for curves in map(whole_curves, retention):
        score = _heights(curves, places).diff(dim=1)
        total = math.ceil(fraction * score.numel())
        counts.append(bisected_counts(list(score), total, 0, TOLERANCE))
    return mean_one(torch.tensor(counts))


def mass_fractions(retention: Tensor, threshold: float) -> tuple[float, ...]:
    """The fraction of tokens that holds the part `threshold` of each layer's score, as the mean
    over prompts of retention [P, L, G]; there is no budget.
    """
    wanted = torch.full((retention.shape[1],), threshold, dtype=torch.float64)
    fractions = [_fractions(whole_curves(curves), wanted, right=False) for curves in retention]
    return tuple(torch.stack(fractions).mean(0).tolist())


def equal_retention(curves: Tensor, fraction: float) -> Tensor:
    """Fractions of tokens [L] whose mean is `fraction`, and for which curves [L, G] are equally
    high; where some are flat, they go the same part of the way over it.
    """
    curves = whole_curves(curves)
    layers = curves.shape[0]
    levels = curves.flatten().unique()

    def at(level: Tensor, right: bool) -> Tensor:
        return _fractions(curves, level.expand(layers), right)

    # the last level that asks for too little, by halving
    low, high = 0, len(levels) - 1
    while high - low > 1:
        middle = (low + high) // 2
        below = bool(at(levels[middle], right=False).mean() <= fraction)
        low, high = (middle, high) if below else (low, middle)
    if bool(at(levels[high], right=False).mean() <= fraction):
        low = high
    # up to a level, over the flat parts on it, and on to the next level
    stops = [at(levels[low], right=False), at(levels[low], right=True)]
    if low < len(levels) - 1:
        stops.append(at(levels[low + 1], right=False))
    for start, end in itertools.pairwise(stops):
        if bool(end.mean() >= fraction) and bool(end.mean() > start.mean()):
            return start + (end - start) * ((fraction - start.mean()) / (end - start).mean())
    return stops[-1]


def whole_curves(curves: Tensor) -> Tensor:
    """Curves [L, G] that start at 0, never fall and end at 1: [L, G + 1] fp64. A layer without any
    score is full after its first step.
    """
    curves = F.pad(curves.double(), (1, 0)).cummax(1).values
    last = curves[:, -1:]
    # nothing to retain
    curves[:, 1:] = torch.where(last > 0, curves[:, 1:], 1.0)
    return curves / curves[:, -1:]


def _heights(curves: Tensor, places: Tensor) -> Tensor:
    """Curves [L, G + 1] at fractions of tokens [T]: [L, T]."""
    steps = curves.shape[1] - 1
    step = (places * steps).long().clamp(max=steps - 1)
    return torch.lerp(curves[:, step], curves[:, step + 1], places * steps - step)


def _fractions(curves: Tensor, level: Tensor, right: bool) -> Tensor:
    """The smallest (`right`: largest) fraction [L] at which curves [L, G + 1] have reached a level
    [L].
    """
    steps = curves.shape[1] - 1
    after = torch.searchsorted(curves, level[:, None].contiguous(), right=right)
    after = after.clamp(1, steps)
    start, end = curves.gather(1, after - 1), curves.gather(1, after)
    rise = torch.where(end > start, end - start, 1.0)
    part = torch.where(end > start, (level[:, None] - start) / rise, float(right)).clamp(0, 1)
    return ((after - 1 + part) / steps)[:, 0]
