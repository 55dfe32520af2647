"""Rotary embedding by an arbitrary shift, in fp32: R(a) R(b) = R(a + b), so a rotated key moves by
its delta.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, shift: Tensor, frequencies: Tensor, style: str) -> Tensor:
    """Rotate the first channels of x [B, H, S, D] by `shift * frequencies`; the others pass.

    shift is [B, K, S] positions, K dividing H; frequencies [W / 2] fp32 radians per position.
    `style` pairs channel i with i + W / 2 ("half") or 2i with 2i + 1 ("interleaved").
    """
    shift = shift.repeat_interleave(x.shape[1] // shift.shape[1], 1)
    angle = angles(shift, frequencies)
    return turned_by(x, angle.cos(), angle.sin(), style)


def angles(shift: Tensor, frequencies: Tensor) -> Tensor:
    """`shift * frequencies` [..., W / 2] in fp32, from their product in fp64."""
    return (shift[..., None].double() * frequencies.double()).float()


def turned_by(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Turn the first channels of x [B, H, S, D] by angles of these cosines and sines, which
    broadcast to [B, H, S, W / 2]. It is linear in both: means of them give the mean rotation.
    """
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    first, second = (
        turned.chunk(2, -1) if style == "half" else (turned[..., 0::2], turned[..., 1::2])
    )
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.cat(pair, -1) if style == "half" else torch.stack(pair, -1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), -1)
