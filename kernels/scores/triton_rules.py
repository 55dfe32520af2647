"""Device code of what a model does to scores before their softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.common.combine import IN_BASE_2
from kvfx.kernels.common.triton_softcap import capped


@triton.jit
def ruled(score, scale, softcap, slope, asked, held):
    """Products as logits in base 2: scaled, soft-capped, less `slope` per position between asked
    and held, which broadcast. What is None changes nothing.
    """
    score = score * scale
    if softcap is not None:
        score = capped(score, softcap)
    if slope is not None:
        score -= slope * IN_BASE_2 * (asked - held).to(tl.float32)
    return score
