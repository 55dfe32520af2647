"""KVTuner: the bits of keys and values of every layer, by what quantization costs there.

Source: Li et al., "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization for
Efficient and Nearly Lossless LLM Inference" (arXiv 2502.04420), and its code.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kvfx.budgets.knapsack import cheapest_errors

# what quantization errors of a calibration stand for, in their order
BITS = (8, 4, 2)
PAIRS = tuple((k, v) for k in BITS for v in BITS)
EXACT = (16, 16)


def tuned_pairs(
    quantization_error: Tensor,
    bits: float,
    *,
    pairs: Sequence[tuple[int, int]],
    exact: Collection[int],
    power: int,
) -> tuple[tuple[int, int], ...]:
    """The (key bits, value bits) of every layer, `bits` on average or fewer, for which errors to
    the `power` sum to the least over layers: quantization_error [P, L, 9] in the order of `PAIRS`.

    Layers in `exact` stay at 16 bits, which count. Bits are those of codes, without scales. The
    search is exact; KVTuner groups layers and samples.
    """
    known = [PAIRS.index(pair) for pair in pairs]
    errors = (quantization_error.double() ** power).mean(0)[:, known]
    layers = [layer for layer in range(len(errors)) if layer not in exact]
    if not layers:
        return (EXACT,) * len(errors)
    # sums of key and value bits: twice the mean
    limit = math.floor(2 * bits * len(errors) + 1e-6) - sum(EXACT) * (len(errors) - len(layers))
    costs = torch.tensor([[k + v for k, v in pairs]] * len(layers))
    chosen = cheapest_errors(errors[layers], costs, limit, cells=max(limit, 1))
    found = {layer: pairs[option] for layer, option in zip(layers, chosen, strict=True)}
    return tuple(found.get(layer, EXACT) for layer in range(len(errors)))
