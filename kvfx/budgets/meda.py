"""MEDA: layers whose attention is spread keep more, by a softmax.

Source: Wan et al., "MEDA: Dynamic KV Cache Allocation for Efficient Multimodal Long-Context
Inference" (arXiv 2502.17599).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.budgets.shares import mean_one


def meda_shares(entropy: Tensor, temperature: float) -> tuple[float, ...]:
    """Shares in proportion to exp(entropy / temperature), entropy [P, L].

    Different from MEDA: attention is that of text to text, where there are no images.
    """
    return mean_one(torch.softmax(entropy.double() / temperature, dim=1))
