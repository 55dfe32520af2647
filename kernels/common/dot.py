"""Matrix products inside kernels."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# the interpreter keeps bf16 as bit patterns, and would multiply those
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b`, accumulated in fp32; fp32 operands are not rounded to fewer bits."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
