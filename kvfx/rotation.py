"""The rotary embedding that a black box computes, learnt from what it does to unit vectors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from kvfx.geometry import Rope
from kvfx.graph import Graph, Miss, extract

PROBES = (0, 3, 17, 400, 1000, 4097)
# the largest positions that are probed; some models have a table that ends before
LONGEST = (4097, 2047, 1023, 511)
aten = torch.ops.aten


def prove_rotation(graph: Graph, node: fx.Node, pre: fx.Node) -> Rope | Miss:
    """Run the path from `pre` to `node` on unit vectors and fit a rotation to what comes out."""
    probe = extract(
        graph.module, [node], [pre, graph.input("position_ids"), graph.input("input_ids")]
    )
    for other in probe.graph.nodes:
        if other.target in (aten.to.dtype, aten._to_copy.default) and _is_low_precision(other):
            other.replace_all_uses_with(other.args[0])
    probe.recompile()
    axis, shape, device = rows_axis(pre), pre.meta["val"].shape, pre.meta["val"].device
    heads, width = int(shape[3 - axis]), int(shape[3])
    unit = torch.eye(width, device=device).expand(1, heads, width, width)
    unit = unit if axis == 2 else unit.transpose(1, 2)

    def matrix(position: int) -> Tensor:
        positions = torch.full((1, width), position, device=device)
        return probe(unit.contiguous(), positions, positions)[0][0, 0].double().cpu()

    for longest in LONGEST:
        with torch.no_grad(), contextlib.suppress(RuntimeError, IndexError):
            return fit_rotation(matrix, longest)
    return Miss("the key's path cannot be run on its own")


def rows_axis(pre: fx.Node) -> int:
    """The axis of rows of a tensor [B, K, S, D] or [B, S, K, D]: the one that is not constant."""
    return 1 if isinstance(pre.meta["val"].shape[1], torch.SymInt) else 2


def _is_low_precision(node: fx.Node) -> bool:
    value = node.meta["val"]
    return value.dtype.is_floating_point and value.dtype.itemsize < 4


def fit_rotation(matrix: Callable[[int], Tensor], longest: int = LONGEST[0]) -> Rope | Miss:
    """The rotary embedding whose matrix at each probed position is `matrix(position)` [D, D], row i
    the image of e_i, up to position `longest`.

    Frequencies come from the angle at position 1, refined at doubled positions: each step doubles
    the phase, and the precision. The fit is then checked at `PROBES`. A constant factor (YaRN's
    attention scaling) is allowed: shifting a key never applies it again.
    """
    one, far = matrix(1), matrix(min(1000, longest))
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
        for exponent in range(1, longest.bit_length()):
            position = 2**exponent
            here = matrix(position)
            phase = torch.atan2(here[first, second], here[first, first])
            turns = ((frequency * position - phase) / (2 * math.pi)).round()
            frequency = (phase + 2 * math.pi * turns) / position
        rope = Rope(style, tuple(frequency.tolist()))
        factor = float(torch.linalg.vector_norm(one[first[0]]))
        if all(
            _agrees(matrix(position), rope, position, factor)
            for position in PROBES
            if position <= longest
        ):
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
