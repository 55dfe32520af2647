"""How certain a measurement is: bootstrap intervals, and McNemar's test for pairs of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

RESAMPLES = 10_000
# of all resamples, those between these two
LOW, HIGH = 0.025, 0.975


def bootstrap_mean(values: Sequence[float], seed: int) -> tuple[float, float] | None:
    """The 95 % interval of the mean, by the percentile bootstrap; None for fewer than two
    values.
    """
    if len(values) < 2:
        return None
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    edges = torch.tensor((LOW, HIGH), dtype=torch.float64)
    low, high = torch.quantile(data[index].mean(1), edges).tolist()
    return low, high


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The probability that two ways, equally good, differ as much on the same samples: exact
    binomial, two-sided.
    """
    pairs = list(zip(first, second, strict=True))
    gained = sum(not a and b for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    differ = gained + lost
    tail = sum(math.comb(differ, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**differ)


def wilson(hits: int, samples: int) -> tuple[float, float]:
    """The 95 % interval of a rate, by Wilson's score."""
    z = 1.959964
    rate, spread = hits / samples, z * z / samples
    middle = rate + spread / 2
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4)
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)
