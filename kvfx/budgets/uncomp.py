"""UNComp: layers in stages, which end where the matrix entropy of keys falls.

Source: Xiong et al., "UNComp: Can Matrix Entropy Uncover Sparsity? A Compressor Design from an
Uncertainty-Aware Perspective" (arXiv 2410.03090), and its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.budgets.shares import mean_one


def stages(entropy: Tensor, drop: float) -> tuple[int, ...]:
    """The stage of each layer: entropy [L] that is lower than the layer's before by more than
    `drop` starts a new one.
    """
    falls = (entropy[:-1] - entropy[1:] > drop).long()
    return (0, *falls.cumsum(0).tolist())


def uncomp_shares(key_entropy: Tensor, drop: float) -> tuple[float, ...]:
    """Shares in proportion to the mean entropy of a layer's stage: key_entropy [P, L].

    Different from UNComp, which gives its stages numbers of tokens by hand and shortens hidden
    states as well: here a stage gets what its entropy is of the mean, and only caches are short.
    """
    mean = key_entropy.double().mean(0)
    stage = torch.tensor(stages(mean, drop))
    sums = torch.zeros_like(mean).index_add(0, stage, mean)
    return mean_one((sums / stage.bincount(minlength=len(mean)).clamp(min=1))[stage][None])
