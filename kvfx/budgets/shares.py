"""Shares of layers: one non-negative number per layer, 1 on average."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.errors import CalibrationError


def mean_one(weights: Tensor) -> tuple[float, ...]:
    """The shares that weights [P, L] of prompts and layers give: every prompt counts alike.

    A prompt whose weights are all zero gives equal shares. Weights that are negative or no numbers
    raise a CalibrationError.
    """
    weights = weights.double()
    if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        raise CalibrationError(
            f"weights of layers must be finite and not negative, these are {weights.tolist()}: "
            "calibrate again"
        )
    largest = weights.amax(1, keepdim=True)
    weights = torch.where(largest > 0, weights / torch.where(largest > 0, largest, 1.0), 1.0)
    shares = (weights / weights.mean(1, keepdim=True)).mean(0)
    return tuple((shares / shares.mean()).tolist())
