"""Words become fp16 numbers without arithmetic: a masked code is a subnormal where it stands.

A code c at bit o of a half word is the fp16 number `c * 2^(o - 24)`. The offset o of a plane is the
same in every part, so `2^(24 - o)` is a factor of the plane that queries and sums carry.
"""

# triton knows no starred tuples
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl


def instructions(bits: int, planes: int) -> str:
    """PTX that cuts two words (one register) into its codes, part by part and plane by plane."""
    codes = 16 // bits
    lines, shifted = ["{ .reg .b32 t;"], 0
    for field in range(codes):
        offset = field % planes * bits % 8
        shift = field * bits - offset
        if shift and shift != shifted:
            lines.append(f"shr.b32 t, ${codes}, {shift};")
        shifted = shift
        mask = (2**bits - 1) << offset
        source = "t" if shift else f"${codes}"
        # the shift pulls bits across the halves, and the mask drops them
        lines.append(f"and.b32 ${field}, {source}, 0x{mask:04x}{mask:04x};")
    return " ".join([*lines, "}"])


@triton.jit
def unpack(x, BITS: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr):
    """The codes of int16 words x as a tuple of fp16 tensors, by part and plane."""
    if ASM != "":
        if BITS == 2:
            out = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [x],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16,
                       tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
        elif BITS == 4:
            out = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,=&r,=&r,r", [x],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            out = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
            )
    else:
        out = ()
        word = x.to(tl.uint16, bitcast=True)
        for field in tl.static_range(16 // BITS):
            part = word
            if field * BITS - field % PLANES * BITS % 8 > 0:
                part = word >> (field * BITS - field % PLANES * BITS % 8)
            code = part & (((1 << BITS) - 1) << (field % PLANES * BITS % 8))
            out = out + (code.to(tl.uint16).to(tl.float16, bitcast=True),)
    return out
