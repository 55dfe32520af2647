"""How far to the right each box stands: near its neighbours, by least squares."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# pixels
BETWEEN_BOXES = 22
# a pull travels one rank in a sweep
PULLS = 400
# how much harder points of a long edge pull at each other than boxes do
STIFF = 16.0


def neighbours(
    count: int, links: Sequence[tuple[int, int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """The boxes that each box reads, and those that read it."""
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for source, target in links:
        above[target].append(source)
        below[source].append(target)
    return above, below


def columns(
    rows: Sequence[Sequence[int]],
    links: Sequence[tuple[int, int]],
    widths: Sequence[float],
    boxes: int,
) -> list[float]:
    """The centre of each box: near its neighbours, and none nearer to the next than it may be.
    Points of long edges pull harder, so that these run straight.
    """
    above, below = neighbours(len(widths), links)
    xs = [0.0] * len(widths)
    for row in rows:
        edge = 0.0
        for box in row:
            xs[box] = edge + widths[box] / 2
            edge += widths[box] + BETWEEN_BOXES
    for sweep in range(PULLS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted, weights = [], []
            for box in row:
                near = [(other, STIFF if other >= boxes and box >= boxes else 1.0)
                        for other in (*above[box], *below[box])]  # fmt: skip
                total = sum(weight for _, weight in near)
                mean = (
                    sum(xs[other] * weight for other, weight in near) / total if near else xs[box]
                )
                wanted.append(mean)
                weights.append(total or 1.0)
            gaps = [
                (widths[left] + widths[right]) / 2 + BETWEEN_BOXES
                for left, right in itertools.pairwise(row)
            ]
            for box, x in zip(row, _apart(wanted, weights, gaps), strict=True):
                xs[box] = x
    return xs


def _apart(wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """The places nearest to those `wanted` (weighted squares) that are `gaps` apart or more."""
    shifts = [0.0]
    for gap in gaps:
        shifts.append(shifts[-1] + gap)
    # places without their gaps only have to rise: pool those that do not
    pools: list[tuple[float, float, int]] = []
    for x, weight, shift in zip(wanted, weights, shifts, strict=True):
        pools.append((x - shift, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, heavy, n), (b, light, m) = pools[-2], pools[-1]
            pools[-2:] = [((a * heavy + b * light) / (heavy + light), heavy + light, n + m)]
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + shift for mean, shift in zip(means, shifts, strict=True)]
