"""CAKE: layers whose attention is spread, or moves, keep more.

Source: Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences" (ICLR
2025), and its code.
"""

from __future__ import annotations

from torch import Tensor

from kvfx.budgets.shares import mean_one


def cake_shares(entropy: Tensor, variance: Tensor, tau1: float, tau2: float) -> tuple[float, ...]:
    """Shares in proportion to entropy^(1 / tau1) * variance^(1 / tau2), both [P, L]: of the last
    queries' attention over earlier keys, in space and over queries.

    Different from CAKE: shares come from a calibration and are the mean over its prompts.
    """
    spread = entropy.double().clamp(min=0) ** (1.0 / tau1)
    return mean_one(spread * variance.double().clamp(min=0) ** (1.0 / tau2))
