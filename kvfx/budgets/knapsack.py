"""One option per layer, the least error in all, within a limit of costs: a knapsack with groups,
solved exactly on a grid of costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvfx.errors import CalibrationError


def cheapest_errors(errors: Tensor, costs: Tensor, limit: int, cells: int) -> tuple[int, ...]:
    """The option of each layer, [L, O] -> L, for which errors sum to the least while costs (whole
    numbers) sum to at most `limit`.

    Exact where the common divisor of costs makes at most `cells` cells. Beyond, costs are rounded
    up to a cell, and what that leaves of the limit is then spent step by step. A limit that no
    choice meets raises a CalibrationError.
    """
    least = costs.amin(1)
    free = limit - int(least.sum())
    if free < 0:
        raise CalibrationError(
            f"the cheapest options cost {int(least.sum())} in all, the limit is {limit}: raise it"
        )
    extra = costs - least[:, None]
    free = min(free, int(extra.amax(1).sum()))
    options = [pareto(e, c) for e, c in zip(errors.tolist(), extra.tolist(), strict=True)]
    unit = math.gcd(*extra.flatten().tolist()) or 1
    cell = unit * max(1, -(-free // (unit * cells)))
    chosen = _on_grid(errors.double(), -(-extra // cell), options, free // cell)
    return _spent(errors.double(), extra, options, chosen, free)


def pareto(errors: Sequence[float], costs: Sequence[int]) -> tuple[int, ...]:
    """The options that no other beats in both error and cost, in ascending order of cost; of equal
    ones the first.
    """
    kept: list[int] = []
    for option in sorted(range(len(errors)), key=lambda o: (costs[o], errors[o], o)):
        if not kept or errors[option] < errors[kept[-1]]:
            kept.append(option)
    return tuple(kept)


def _on_grid(
    errors: Tensor, cells: Tensor, options: list[tuple[int, ...]], limit: int
) -> list[int]:
    """The best choice for costs in cells, layer after layer: best[c] is the least error of the
    layers so far within c cells.
    """
    best = torch.zeros(limit + 1, dtype=torch.float64)
    taken = []
    for layer, kept in enumerate(options):
        rows = torch.full((len(kept), limit + 1), math.inf, dtype=torch.float64)
        for row, option in zip(rows, kept, strict=True):
            cost = int(cells[layer, option])
            if cost <= limit:
                row[cost:] = best[: limit + 1 - cost] + errors[layer, option]
        best, choice = rows.min(0)
        taken.append(choice)
    chosen, left = [], limit
    for layer in reversed(range(len(options))):
        option = options[layer][int(taken[layer][left])]
        chosen.append(option)
        left -= int(cells[layer, option])
    return chosen[::-1]


def _spent(
    errors: Tensor, costs: Tensor, options: list[tuple[int, ...]], chosen: list[int], limit: int
) -> tuple[int, ...]:
    """The choice after every better option that the limit still allows, steepest first."""
    while True:
        left = limit - sum(int(costs[layer, option]) for layer, option in enumerate(chosen))
        steps = []
        for layer, (kept, now) in enumerate(zip(options, chosen, strict=True)):
            for option in kept:
                gain = float(errors[layer, now] - errors[layer, option])
                price = int(costs[layer, option] - costs[layer, now])
                if gain > 0 and price <= left:
                    steps.append((-gain / price, layer, option))
        if not steps:
            return tuple(chosen)
        _, layer, option = min(steps)
        chosen[layer] = option
