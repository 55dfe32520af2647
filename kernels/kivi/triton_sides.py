"""Blocks with query heads on one side and tokens or channels on the other.

Heads are rows, 16 or more of them, or columns where that is NARROW: 8 fill a product's narrow side,
and its wide side is filled by what is read from the cache.
"""

# triton knows no starred tuples
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def by_head(x, NARROW: tl.constexpr):
    """Numbers per head [M], to meet a block."""
    return x[None, :] if NARROW else x[:, None]


@triton.jit
def by_token(x, NARROW: tl.constexpr):
    """Numbers per token or channel, to meet a block."""
    return x[:, None] if NARROW else x[None, :]


@triton.jit
def blank(HEADS: tl.constexpr, OTHERS: tl.constexpr, NARROW: tl.constexpr):
    """A block of zeros."""
    out = tl.zeros([OTHERS, HEADS] if NARROW else [HEADS, OTHERS], dtype=tl.float32)
    return out


@triton.jit
def product(heads, cache, acc, NARROW: tl.constexpr):
    """`acc + heads @ cache`, where heads and acc are blocks."""
    if NARROW:
        out = tl.dot(tl.trans(cache), heads, acc, input_precision="ieee")
    else:
        out = tl.dot(heads, cache, acc, input_precision="ieee")
    return out


@triton.jit
def decayed(blocks, decay, NARROW: tl.constexpr):
    """Every block of the tuple times a number per head."""
    out = ()
    for i in tl.static_range(len(blocks)):
        out = out + (blocks[i] * by_head(decay, NARROW),)
    return out


@triton.jit
def add_zeros(sums, weight, units, part: tl.constexpr, GROUPS: tl.constexpr, NARROW: tl.constexpr):
    """Add weights times the zeros of their tokens, a block per group: to be summed once.

    `units` are the scales and zeros of tokens, by part and group.
    """
    out = ()
    for g in tl.static_range(GROUPS):
        x = units[(part * GROUPS + g) * 2 + 1].to(tl.float32)
        out = out + (sums[g] + weight * by_token(x, NARROW),)
    return out


@triton.jit
def add_zeros_by_product(
    sums, weight, zeros, token,
    GROUPS: tl.constexpr, NARROW: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Add weights times the zeros of their tokens to one block whose columns are groups."""
    at = zeros + token[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    return (product(weight.to(NUMBER), tl.load(at).to(NUMBER), sums[0], NARROW),)


@triton.jit
def zero_of(
    sums, group: tl.constexpr, GROUPS: tl.constexpr, BY_PRODUCT: tl.constexpr, NARROW: tl.constexpr
):
    """The sum of one group [M]."""
    if BY_PRODUCT:
        chosen = by_token(tl.arange(0, GROUPS) == group, NARROW)
        out = tl.sum(tl.where(chosen, sums[0], 0.0), 0 if NARROW else 1)
    else:
        out = tl.sum(sums[group], 0 if NARROW else 1)
    return out


@triton.jit
def regroup(
    scores, HEADS: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr,
    OLD: tl.constexpr, NEW: tl.constexpr,
):  # fmt: skip
    """Scores (heads are rows) in OLD parts of PACK tiles as NEW parts, joined or split."""
    out = scores
    if OLD > NEW:
        pairs = ()
        for i in tl.static_range(OLD // 2):
            a = tl.reshape(scores[2 * i], [HEADS, PACK, GROUP // OLD])
            b = tl.reshape(scores[2 * i + 1], [HEADS, PACK, GROUP // OLD])
            both = tl.permute(tl.join(a, b), [0, 1, 3, 2])
            pairs = pairs + (tl.reshape(both, [HEADS, PACK * (GROUP // OLD) * 2]),)
        out = regroup(pairs, HEADS, PACK, GROUP, OLD // 2, NEW)
    if OLD < NEW:
        halves = ()
        for i in tl.static_range(OLD):
            both = tl.reshape(scores[i], [HEADS, PACK, 2, GROUP // OLD // 2])
            a, b = tl.split(tl.permute(both, [0, 1, 3, 2]))
            a = tl.reshape(a, [HEADS, PACK * (GROUP // OLD // 2)])
            b = tl.reshape(b, [HEADS, PACK * (GROUP // OLD // 2)])
            halves = halves + (a, b)
        out = regroup(halves, HEADS, PACK, GROUP, OLD * 2, NEW)
    return out
