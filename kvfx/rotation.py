"""The rotary embedding that a black box computes, learnt from what it does to unit vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvfx.geometry import Rope
from kvfx.graph import Miss

# frequencies are refined at doubled positions: each step doubles the phase, and the precision
DOUBLINGS = 13
PROBES = (0, 3, 17, 1000, 4097)


def fit_rotation(matrix: Callable[[int], Tensor]) -> Rope | Miss:
    """The rotary embedding whose matrix at each probed position is `matrix(position)` [D, D], row i
    the image of e_i.

    Frequencies come from the angle at position 1, refined at doubled positions; the fit is then
    checked at `PROBES`. A constant factor (YaRN's attention scaling) is allowed: shifting a key
    never applies it again.
    """
    one, far = matrix(1), matrix(1000)
    moved = (far != torch.eye(len(far), dtype=far.dtype)).any(1)
    turned = moved.nonzero().flatten().tolist()
    if not turned:
        return Miss("the key is not rotated")
    width = turned[-1] + 1
    if width % 2:
        return Miss(f"an odd number of channels ({width}) is rotated")
    for style in ("half", "interleaved"):
        first, second = _pairs(style, width)
        angle = torch.atan2(one[first, second], one[first, first])
        frequency = angle % (2 * math.pi)
        for exponent in range(1, DOUBLINGS):
            position = 2**exponent
            here = matrix(position)
            phase = torch.atan2(here[first, second], here[first, first])
            turns = ((frequency * position - phase) / (2 * math.pi)).round()
            frequency = (phase + 2 * math.pi * turns) / position
        rope = Rope(style, tuple(frequency.tolist()))
        factor = float(torch.linalg.vector_norm(one[first[0]]))
        if all(_agrees(matrix(position), rope, position, factor) for position in PROBES):
            return rope
    return Miss("the key's path is linear but no rotation of pairs of channels")


def _agrees(found: Tensor, rope: Rope, position: int, factor: float) -> bool:
    """Whether `found` is the rotation by `position`, up to the rounding of an fp32 phase."""
    first, second = _pairs(rope.style, rope.width)
    phase = position * torch.tensor(rope.frequencies, dtype=torch.float64)
    expected = torch.eye(len(found), dtype=torch.float64)
    expected[first, first] = expected[second, second] = phase.cos() * factor
    expected[first, second], expected[second, first] = phase.sin() * factor, -phase.sin() * factor
    return bool((found - expected).abs().max() <= 1e-5 + 2.0**-21 * position)


def _pairs(style: str, width: int) -> tuple[Tensor, Tensor]:
    """The channels that turn together, as two index tensors."""
    index = torch.arange(width // 2)
    return (index, index + width // 2) if style == "half" else (2 * index, 2 * index + 1)
