"""Soft-capping of scores inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.common.combine import IN_BASE_2


@triton.jit
def capped(score, softcap):
    """`softcap * tanh(score / softcap)` for scores in base 2, the cap being a logit."""
    # tanh(x) = 1 - 2 / (e^2x + 1), which is 1 long before e^2x overflows
    power = tl.exp2(tl.minimum(2.0 * score / softcap, 64.0))
    return softcap * IN_BASE_2 * (1.0 - 2.0 / (power + 1.0))
