"""PyramidKV: budgets that fall from the first layer to the last in equal steps.

Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
Funneling" (arXiv 2406.02069), and its code.
"""

from __future__ import annotations


def pyramid_shares(layers: int, beta: float, fraction: float) -> tuple[float, ...]:
    """Shares that fall from 2 - 1 / beta to 1 / beta in equal steps; their mean is 1, exactly up to
    rounding (the published code rounds its step down, so that its sum is too large).

    `fraction` is the mean budget as a part of the tokens: no layer keeps more than all of them, and
    the last one gains what the first one loses. The window, which every layer keeps, is part of
    neither.
    """
    top = min(2.0 - 1.0 / beta, 1.0 / fraction)
    if layers == 1:
        return (1.0,)
    step = (2.0 * top - 2.0) / (layers - 1)
    return tuple(top - layer * step for layer in range(layers))
