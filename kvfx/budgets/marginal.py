"""The next step goes where it retains most: XKV over mean curves, DynamicKV over those of windows.

Sources: Li et al., "XKV: Personalized KV Cache Memory Reduction for Long-Context LLM Inference"
(arXiv 2412.05896); Zhou et al., "DynamicKV: Task-Aware Adaptive KV Cache Compression for Long
Context LLMs" (arXiv 2412.14838).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.budgets.shares import mean_one


def xkv_shares(retention: Tensor, fraction: float) -> tuple[float, ...]:
    """Shares that retain the most score, summed over layers, for `fraction` of the tokens: curves
    are means over the prompts of retention [P, L, G].

    Exact for these curves. XKV samples its curves otherwise, in a way that is not published.
    """
    mean = retention.double().mean(0)
    return mean_one(best_fractions(mean, fraction, torch.ones(len(mean)))[None])


def dynamic_shares(window_retention: Tensor, fraction: float, most: float) -> tuple[float, ...]:
    """Shares of layers in the best tokens of all layers, as the mean over prompts of
    window_retention [P, L, G]; no layer keeps more than `most` times the mean budget.

    Different from DynamicKV: heads are averaged before they are compared, and shares are the
    same for all prompts.
    """
    cap = torch.full((window_retention.shape[1],), min(1.0, most * fraction))
    rows = [best_fractions(curves, fraction, cap) for curves in window_retention]
    return mean_one(torch.stack(rows))


def best_fractions(curves: Tensor, fraction: float, most: Tensor) -> Tensor:
    """Fractions of tokens [L], up to `most` [L] and `fraction` on average, that maximise the sum of
    concave curves [L, G]: the steepest steps of all layers come first, equal ones alike.
    """
    layers, steps = curves.shape
    gain = F.pad(curves.double(), (1, 0)).diff(dim=1).sort(1, descending=True).values
    width = (most.double()[:, None] * steps - torch.arange(steps)).clamp(0, 1)
    order = gain.flatten().argsort(descending=True)
    filled = width.flatten()[order].cumsum(0)
    wanted = min(fraction * layers * steps, filled[-1].item())
    last = torch.searchsorted(filled, wanted - 1e-9).clamp(max=len(order) - 1)
    steepness = gain.flatten()[order[last]]
    sure = torch.where(gain > steepness, width, 0.0).sum(1)
    equal = torch.where(gain == steepness, width, 0.0).sum(1)
    return (sure + equal * ((wanted - sure.sum()) / equal.sum())) / steps
