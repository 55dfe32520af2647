"""Asymmetric uniform quantization of groups: integer codes with an fp16 scale and an fp16 zero.

Scale and zero are rounded to fp16 first and the codes are computed with the rounded ones, so that
what is stored is the best reading of itself. All arithmetic is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# the largest finite and the smallest positive fp16 number
LARGEST = 65504.0
SMALLEST = 2.0**-24


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (int32, like x), scale and zero (fp16, `dim` kept as 1) of groups along `dim`."""
    scale, zero = parameters(x, bits, dim)
    return encode(x, scale, zero, bits), scale, zero


def parameters(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Scale and zero (fp16, `dim` kept as 1) of groups along `dim`; what is beyond fp16 saturates.

    The scale is never zero, so a constant group is exact up to the fp16 rounding of its value.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(SMALLEST, LARGEST)
    return scale.half(), low.clamp(-LARGEST, LARGEST).half()


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, int32, under parameters that broadcast to x."""
    code = (x.float() - zero.float()) / scale.float()
    return code.clamp(0, 2**bits - 1).round().to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The numbers that codes stand for, fp32: `code * scale + zero`."""
    return codes.float() * scale.float() + zero.float()


def quantize_keys(k: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per-channel codes of tiles k [..., G, D]: codes alike, scale and zero [..., D]."""
    codes, scale, zero = quantize(k, bits, dim=-2)
    return codes, scale.squeeze(-2), zero.squeeze(-2)


def quantize_values(v: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token codes of v [..., D]: codes alike, scale and zero [..., D / group_size]."""
    codes, scale, zero = quantize(v.unflatten(-1, (-1, group_size)), bits, dim=-1)
    return codes.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)


def dequantize_keys(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Tiles of keys, fp32 [..., G, D], from codes [..., G, D] and scale, zero [..., D]."""
    return dequantize(codes, scale.unsqueeze(-2), zero.unsqueeze(-2))


def dequantize_values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values, fp32 [..., D], from codes [..., D] and scale, zero [..., D / group_size]."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1))
    return dequantize(groups, scale.unsqueeze(-1), zero.unsqueeze(-1)).flatten(-2)
