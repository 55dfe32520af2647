"""SqueezeAttention: layers that change the residual stream least give budget to the others.

Source: Wang et al., "SqueezeAttention: 2D Management of KV-Cache in LLM Inference via Layer-wise
Optimal Budget" (arXiv 2404.04793).
"""

from __future__ import annotations

import math

from torch import Tensor


def squeeze_shares(similarity: Tensor, groups: int, part: float) -> tuple[float, ...]:
    """Shares under which the group of layers with the largest similarity keeps `part` of an even
    budget, and all others get the rest alike: similarity [P, L], before and after attention.

    Groups are those of k-means in one dimension, exactly (the published code starts at random).
    Layers that are all in one group share evenly.
    """
    mean = similarity.double().mean(0).tolist()
    group = clusters(mean, groups)
    top = max(group)
    weak = group.count(top)
    strong = len(group) - weak
    if strong == 0:
        return (1.0,) * len(group)
    rest = (len(group) - part * weak) / strong
    return tuple(part if member == top else rest for member in group)


def clusters(values: list[float], groups: int) -> tuple[int, ...]:
    """The group of each value, in ascending order of values, so that squared distances to the means
    of at most `groups` groups are smallest; equal values share a group.
    """
    points = sorted(set(values))
    weight = [values.count(point) for point in points]
    groups = min(groups, len(points))

    def distance(start: int, end: int) -> float:
        part = list(zip(weight[start:end], points[start:end], strict=True))
        mean = sum(w * x for w, x in part) / sum(w for w, _ in part)
        return sum(w * (x - mean) ** 2 for w, x in part)

    # best[n]: the distance of the first n points in so many groups, and where the last one starts
    best = [(0.0, 0)] + [(math.inf, 0)] * len(points)
    starts = []
    for _ in range(groups):
        best = [(math.inf, 0)] + [
            min((best[start][0] + distance(start, end), start) for start in range(end))
            for end in range(1, len(points) + 1)
        ]
        starts.append([start for _, start in best])
    bounds, end = [], len(points)
    for row in reversed(starts):
        bounds.append(row[end])
        end = row[end]
    first = [points[start] for start in sorted(bounds)]
    return tuple(sum(value >= point for point in first) - 1 for value in values)
