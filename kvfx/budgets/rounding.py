"""Shares as whole numbers of entries, in Python; `share_entries` of the budgets room does the same
on the device.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

# a largest share as a whole number: ratios of counts (below 2^24) and shares are then told apart,
# and ordered, by fp64
SHARE = 1 << 24


def share_entries(
    tokens: int, fraction: float, entries: int, protected: int, least: int, shares: Sequence[float]
) -> tuple[int, ...]:
    """Entries that every layer keeps of a prompt of `tokens` tokens; their sum is that of uniform
    budgets (`entries`, or that `fraction` of the tokens when it is 0), exactly.

    Every layer has its `protected` entries; shares divide the others, but no layer gets fewer than
    `least` or more than its tokens, or than a uniform budget where that is more.
    """
    each = max(entries or math.ceil(tokens * fraction), least)
    most, held = max(tokens, each), min(each, protected)
    bottom = max(least - held, 0)
    divided = largest_remainder(shares, (each - held) * len(shares), bottom, most - held)
    return tuple(held + count for count in divided)


def largest_remainder(
    shares: Sequence[float], total: int, least: Sequence[int] | int, most: Sequence[int] | int
) -> tuple[int, ...]:
    """Whole numbers in proportion to shares whose sum is `total`, or as near as `least` and `most`
    allow (a cap is stronger than a floor).

    The rule is Webster's: the layer with the smallest (count + 1/2) / share is the next to get an
    entry, equal ones in their order. Where no bound binds, counts are shares of the total rounded
    to the nearest, corrected by the largest remainders; unlike remainders alone, a larger total
    never takes an entry from a layer. A layer whose share is zero is filled last.
    """
    layers = range(len(shares))
    caps = [most] * len(shares) if isinstance(most, int) else list(most)
    floors = [least] * len(shares) if isinstance(least, int) else list(least)
    floors = [min(floor, cap) for floor, cap in zip(floors, caps, strict=True)]
    total = min(max(total, sum(floors)), sum(caps))
    weights = whole_shares(shares)
    count = _near(weights, total, floors, caps)

    def next_turn(layer: int) -> tuple[float, int]:
        open_ = count[layer] < caps[layer]
        return ((2 * count[layer] + 1) / weights[layer] if open_ else math.inf, layer)

    def last_turn(layer: int) -> tuple[float, int]:
        taken = count[layer] > floors[layer]
        return ((2 * count[layer] - 1) / weights[layer] if taken else -math.inf, layer)

    missing = total - sum(count)
    while missing > 0:
        count[min(map(next_turn, layers))[1]] += 1
        missing -= 1
    while missing < 0:
        count[max(map(last_turn, layers))[1]] -= 1
        missing += 1
    # rounding may have let a later turn in before an earlier one
    while min(map(next_turn, layers)) < max(map(last_turn, layers)):
        first, last = min(map(next_turn, layers)), max(map(last_turn, layers))
        count[first[1]] += 1
        count[last[1]] -= 1
    return tuple(count)


def whole_shares(shares: Sequence[float]) -> list[int]:
    """Shares as whole numbers, the largest as `SHARE`; none is zero, and all are alike where all
    are zero.
    """
    largest = max(shares)
    return [max(1, round(share / largest * SHARE)) if largest > 0 else 1 for share in shares]


def _near(weights: list[int], total: int, floors: list[int], caps: list[int]) -> list[int]:
    """Counts whose sum differs from `total` by at most half the layers: a common level, times
    weights, within bounds, rounded.
    """

    def filled(level: float) -> float:
        rows = zip(weights, floors, caps, strict=True)
        return sum(min(max(level * weight, floor), cap) for weight, floor, cap in rows)

    ends = sorted(
        bound / weight
        for bounds in (floors, caps)
        for weight, bound in zip(weights, bounds, strict=True)
    )
    after = min(max(bisect.bisect_left(ends, total, key=filled), 1), len(ends) - 1)
    start, end = ends[after - 1], ends[after]
    low, high = filled(start), filled(end)
    level = start + (end - start) * ((total - low) / (high - low)) if high > low else end
    rows = zip(weights, floors, caps, strict=True)
    return [min(max(math.floor(level * weight + 0.5), floor), cap) for weight, floor, cap in rows]
