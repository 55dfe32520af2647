"""Error budgets that come from the truth, not from a hand-tuned tolerance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# a correct kernel may order its sums differently than the low-precision reference
FACTOR = 2.0


def assert_as_accurate_as(out: Tensor, *, low_precision: Tensor, truth: Tensor) -> None:
    """Pass when `out` is as close to the fp64 `truth` as a plain one of the same precision.

    `err(out) <= 2 * (err(low_precision) + rounding band)`, for the largest error and for the root
    mean square. `low_precision` is the reference computed in the dtype of `out`; the band is what
    storing the truth in that dtype costs. All three have one shape.
    """
    assert truth.dtype == torch.float64, f"the truth must be float64, not {truth.dtype}"
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, truth {tuple(truth.shape)}"
    assert low_precision.shape == truth.shape, (
        f"low_precision has shape {tuple(low_precision.shape)}, truth {tuple(truth.shape)}"
    )
    if truth.numel() == 0:
        return
    truth = truth.cpu()
    error, reference = _error(out, truth), _error(low_precision, truth)
    assert bool(reference.isfinite().all()), (
        "low_precision or truth is not finite: nothing to compare with"
    )
    step = rounding_step(out.dtype)
    # evenly spread rounding errors have 1 / sqrt(3) of the largest one as their root mean square
    measures = (
        ("largest", _largest, step),
        ("root mean square", _root_mean_square, step / math.sqrt(3)),
    )
    for name, size, share in measures:
        band = share * size(truth)
        budget = FACTOR * (size(reference) + band)
        # written so that NaN fails
        assert size(error) <= budget, (
            f"{name} error {size(error):.3e} exceeds {budget:.3e} = {FACTOR:g} * "
            f"(low precision {size(reference):.3e} + rounding {band:.3e}); "
            f"{_worst(out, truth, error)}"
        )


def rounding_step(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to `dtype`: half a step above 1."""
    return torch.finfo(dtype).eps / 2


def _error(out: Tensor, truth: Tensor) -> Tensor:
    return (out.detach().cpu().double() - truth).abs()


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _worst(out: Tensor, truth: Tensor, error: Tensor) -> str:
    """Where the worst element is (a NaN is the worst), and what it should have been."""
    flat = int(error.nan_to_num(nan=float("inf")).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), truth.shape))
    return f"worst at {index}: {out[index].item():.6g}, truth {truth[index].item():.6g}"
