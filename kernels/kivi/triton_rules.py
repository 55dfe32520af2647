"""Rules of attention inside kernels: what scores become before they are weighed."""

# triton knows no starred tuples
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.common.combine import IN_BASE_2
from kvfx.kernels.kivi.triton_sides import by_head, by_token


@triton.jit
def ruled(score, token, there, rules, NARROW: tl.constexpr):
    """A block of scores (base 2) under the rules; -inf where a row does not see a token.

    `rules` are the positions and slopes of rows [M], where the position and the bias of the first
    token are, softcap, window and chunk; each may be None. Tokens [N] have numbers if `there`.
    """
    asked, slope, position, bias, softcap, window, chunk = rules
    if softcap is not None:
        # tanh(x) = 1 - 2 / (e^2x + 1), in base 2; the cap is a logit
        score = softcap * IN_BASE_2 * (1.0 - 2.0 / (tl.exp2(2.0 * score / softcap) + 1.0))
    if bias is not None:
        added = tl.load(bias + token, mask=there, other=0.0).to(tl.float32) * IN_BASE_2
        score += by_token(added, NARROW)
    if asked is not None:
        held = token
        if position is not None:
            held = tl.load(position + token, mask=there, other=-1).to(tl.int32)
        distance = by_head(asked, NARROW) - by_token(held, NARROW)
        if slope is not None:
            score -= by_head(slope * IN_BASE_2, NARROW) * distance.to(tl.float32)
        seen = by_token(held >= 0, NARROW) & (distance >= 0)
        if window is not None:
            seen = seen & (distance < window)
        if chunk is not None:
            seen = seen & (by_head(asked // chunk, NARROW) == by_token(held // chunk, NARROW))
        score = tl.where(seen, score, float("-inf"))
    return score


@triton.jit
def ruled_tiles(
    scores, units, tile, at_vr, rules,
    GROUP: tl.constexpr, ROWS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The parts of tiles, whose scores are in `units` [M], as scores (base 2) under the rules."""
    out = ()
    for u in tl.static_range(len(scores)):
        token = (tile + at_vr // ROWS) * GROUP + u * ROWS + at_vr % ROWS
        score = scores[u] * by_head(units, NARROW)
        out = out + (ruled(score, token, token >= 0, rules, NARROW),)
    return out
