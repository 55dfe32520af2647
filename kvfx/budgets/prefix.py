"""PrefixKV: the same part of the score in every layer, by an exact search or by bisection.

Source: Wang et al., "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models
Need for Efficient Generation" (arXiv 2412.03409), and its code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# a largest score as a whole number: sums are exact, so a search finds the same on every device
MASS = 1 << 44


def prefix_counts(scores: Sequence[Tensor], total: int, least: int) -> tuple[int, ...]:
    """Entries that each layer keeps of its score [N] (fp64, not negative), `total` in all: those
    with the least of their layer's score before them, of all layers' entries in descending order.

    Equal ones prefer the smaller rank, then the first layer. Layers keep at least `least` where the
    total reaches. A larger total never takes an entry from a layer.
    """
    return _first([retained_before(score, least) for score in scores], [0] * len(scores), total)


def bisected_counts(
    scores: Sequence[Tensor], total: int, least: int, tolerance: int
) -> tuple[int, ...]:
    """The same by the published search: halve the interval of a common threshold until the layers'
    prefixes hold fewer than `tolerance` entries too many or too few.

    It also ends where no more than one value is left between the bounds; the entries that are then
    missing are the next ones of the exact search, those too many its last ones.
    """
    retained = [retained_before(score, least) for score in scores]
    low, high = 0.0, math.nextafter(1.0, 2.0)
    prefix = _prefixes(retained, low)
    while abs(sum(prefix) - total) >= tolerance:
        between = torch.cat([r[(r >= low) & (r < high)] for r in retained])
        if len(between.unique()) <= 1:
            break
        middle = (low + high) / 2
        prefix = _prefixes(retained, middle)
        low, high = (middle, high) if sum(prefix) < total else (low, middle)
    if sum(prefix) > total:
        prefix = _prefixes(retained, low)
    # floors may be more than the total
    known = prefix if sum(prefix) <= total else [0] * len(prefix)
    return _first(retained, known, total)


def retained_before(score: Tensor, least: int) -> Tensor:
    """The part of a layer's score [N] that stands before each entry in descending order, fp64; -1
    for the first `least` entries.

    Of a layer without any score the first entry counts as all of it.
    """
    largest = score.max().item() if len(score) else 0.0
    mass = torch.round(score.double() / (largest or 1.0) * MASS).long()
    ordered = mass.sort(descending=True).values
    whole = int(ordered.sum())
    before = (ordered.cumsum(0) - ordered).double() / max(whole, 1)
    if whole == 0:
        before[1:] = 1.0
    before[:least] = -1.0
    return before


def _prefixes(retained: list[Tensor], threshold: float) -> list[int]:
    """The entries that each layer needs to hold the part `threshold` of its score."""
    return [int(torch.searchsorted(r, threshold)) for r in retained]


def _first(retained: list[Tensor], prefix: list[int], total: int) -> tuple[int, ...]:
    """How many of the first `total` entries are in each layer, given that its prefix is."""
    ranked = sorted(
        (value, rank, layer)
        for layer, (values, start) in enumerate(zip(retained, prefix, strict=True))
        for rank, value in enumerate(values[start:].tolist(), start)
    )
    chosen = [layer for _, _, layer in ranked[: max(total - sum(prefix), 0)]]
    return tuple(start + chosen.count(layer) for layer, start in enumerate(prefix))
