"""KVCrush on a GPU: bits of all heads packed into words, and distances by counting bits.

Two sorts give what is best and who is near; no sort is of vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.crush.configs import Config, config
from kvfx.kernels.crush.split import evictable, fixed_anchor, picked_ranks, representatives

WORD_BITS = 32
# distances are int16; what is no candidate is farther than any
FAR = 32767
# the key of rows that are not in the pool: below that of -inf
OUTSIDE = -(2**31)


def constraint(
    verb: str, *operands: Tensor | None, page: int = 1, **attributes: object
) -> str | None:
    """Why the kernels of `verb` ("refine") cannot serve these operands, or None."""
    del verb, attributes
    score = operands[0]
    assert score is not None
    if score.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"scores are fp32, fp16 or bf16, not {score.dtype}"
    if page != 1:
        return f"rows are chosen one by one, not in pages of {page}"
    if score.shape[1] >= FAR:
        return f"a distance of {score.shape[1]} heads does not fit into 16 bits"
    return launch.unavailable(score.device)


def refine(
    score: Tensor,
    keep: Tensor,
    live: Tensor,
    position: Tensor | None,
    *,
    sinks: int,
    recent: int,
    share: float,
    ratio: float,
    anchor: str,
    bits: str,
    pick: str,
    page: int,
    seed: int,
) -> Tensor:
    """As many rows as `keep` [B, K, T] has: protected and best ones of it, and representatives.

    `position` [B, K, T] says which token a row is where heads hold different ones, else a row is
    the same token in all.
    """
    launch.require("refine_crush", constraint("refine", score, page=page))
    assert bits in ("half", "keepset"), bits
    pool = evictable(keep, live, sinks, recent, share)
    kept = keep & pool
    elected = representatives(kept.sum(-1), ratio)
    half, best = _better(score, pool, kept, kept.sum(-1) - elected)
    candidates = pool & ~best
    found = candidates.sum(-1)

    kv_heads, rows = score.shape[1:]
    chosen = config(launch.machine(score.device).arch, searched=position is not None)
    marks = half if bits == "half" else keep.contiguous()
    votes = None
    if anchor == "mean":
        votes = torch.zeros(*found.shape, kv_heads, dtype=torch.int32, device=score.device)
    words = _words(marks, candidates, live, position, votes, chosen)
    if votes is not None:
        distance = distances(words, candidates, votes, found.int(), chosen)
    else:
        fixed = fixed_anchor(anchor, kv_heads, seed, score.device).int()
        distance = distances(words, candidates, fixed, None, chosen)

    order = torch.sort(distance, dim=-1, stable=True).indices
    taken = picked_ranks(found, elected, rows, pick)
    return (keep & ~candidates) | torch.zeros_like(candidates).scatter(-1, order, taken)


def _better(score: Tensor, pool: Tensor, kept: Tensor, important: Tensor) -> tuple[Tensor, Tensor]:
    """The better half of the pool, and the best `important` [B, K] of the kept: one sort."""
    # both zeros are equal, NaN is the smallest
    ranked = score.float().masked_fill(score.isnan(), float("-inf")) + 0.0
    code = ranked.contiguous().view(torch.int32)
    key = (code ^ ((code >> 31) & 0x7FFFFFFF)).masked_fill(~pool, OUTSIDE)
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    half = torch.arange(pool.shape[-1], device=pool.device) < (pool.sum(-1) // 2)[..., None]
    among = kept.gather(-1, order)
    best = among & (among.cumsum(-1) <= important[..., None])
    none = torch.zeros(pool.shape, dtype=torch.bool, device=pool.device)
    return none.scatter(-1, order, half), none.scatter(-1, order, best)


def _words(
    marks: Tensor,
    candidates: Tensor,
    live: Tensor,
    position: Tensor | None,
    votes: Tensor | None,
    chosen: Config,
) -> Tensor:
    """The bits of all heads for each row, 32 to a word: [B, K, W, T] int32. Counts those of the
    candidates in `votes` [B, K, K].
    """
    batch, kv_heads, rows = marks.shape
    words = torch.empty(
        batch, kv_heads, triton.cdiv(kv_heads, WORD_BITS), rows, dtype=torch.int32,
        device=marks.device,
    )  # fmt: skip
    held = None
    if position is not None:
        position = position.int().contiguous()
        # rows that are not live repeat the one before: sorted, and found after it
        held = position.masked_fill(~live, -1).cummax(-1).values
    launch.run(
        word_kernel, (batch * kv_heads, triton.cdiv(rows, chosen.rows)), marks, candidates, held,
        position, words, votes, kv_heads, rows, words.shape[2],
        triton.next_power_of_2(rows) // 2,
        BLOCK=chosen.rows, warps=chosen.warps, stages=1,
    )  # fmt: skip
    return words


def distances(
    words: Tensor, candidates: Tensor, votes: Tensor, limit: Tensor | None, chosen: Config
) -> Tensor:
    """How many bits of words [B, K, W, T] are not those of the anchor, [B, K, T] int16: its bits
    are where twice the votes [K] or [B, K, K] exceed `limit` [B, K] (None: 0).
    """
    batch, kv_heads, _, rows = words.shape
    distance = torch.empty(batch, kv_heads, rows, dtype=torch.int16, device=words.device)
    launch.run(
        distance_kernel, (batch * kv_heads, triton.cdiv(rows, chosen.rows)), words, candidates,
        votes, limit, distance, 0 if limit is None else kv_heads, kv_heads, rows, words.shape[2],
        FAR=FAR, BLOCK=chosen.rows, warps=chosen.warps, stages=1,
    )  # fmt: skip
    return distance


@triton.jit
def word_kernel(
    marks, candidates, held, position, words, votes, kv_heads, rows, width, step,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of the batch, KV head and block of rows."""
    pair = tl.program_id(0).to(tl.int64)
    first = pair // kv_heads * kv_heads
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    candidate = tl.load(candidates + pair * rows + row, mask=inside, other=0).to(tl.int32)
    if held is not None:
        wanted = tl.load(position + pair * rows + row, mask=inside, other=-1)
    for word in tl.range(0, width):
        packed = tl.zeros([BLOCK], dtype=tl.int32)
        for bit in tl.range(0, tl.minimum(32, kv_heads - word * 32)):
            other = (first + word * 32 + bit) * rows
            if held is not None:
                at = _find(held + other, wanted, rows, step, BLOCK)
                same = tl.load(held + other + at, mask=at < rows, other=-1) == wanted
                mark = tl.load(marks + other + at, mask=same, other=0).to(tl.int32)
            else:
                mark = tl.load(marks + other + row, mask=inside, other=0).to(tl.int32)
            packed |= mark << bit
            if votes is not None:
                vote = votes + pair * kv_heads + word * 32 + bit
                tl.atomic_add(vote, tl.sum(mark & candidate, 0), sem="relaxed")
        tl.store(words + (pair * width + word) * rows + row, packed, mask=inside)


@triton.jit
def distance_kernel(
    words, candidates, votes, limit, distance, vote_pair, kv_heads, rows, width,
    FAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of the batch, KV head and block of rows."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    lane = tl.arange(0, 32)
    needed = 0
    if limit is not None:
        needed = tl.load(limit + pair)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for word in tl.range(0, width):
        bit = word * 32 + lane
        vote = tl.load(votes + pair * vote_pair + bit, mask=bit < kv_heads, other=0)
        # 32 different bits: their sum is the word
        anchor = tl.sum((2 * vote > needed).to(tl.int32) << lane, 0)
        packed = tl.load(words + (pair * width + word) * rows + row, mask=inside, other=0)
        total += _ones(packed ^ anchor)
    candidate = tl.load(candidates + pair * rows + row, mask=inside, other=0) != 0
    tl.store(distance + pair * rows + row, tl.where(candidate, total, FAR), mask=inside)


@triton.jit
def _find(held, wanted, rows, step, BLOCK: tl.constexpr):
    """How many of `rows` sorted numbers are below `wanted`, the last one aside: `step` is half of
    the next power of 2.
    """
    below = tl.zeros([BLOCK], dtype=tl.int32)
    # an argument of 1 is a constant of the compiler's
    step = tl.full([], step, dtype=tl.int32)
    while step > 0:
        last = below + step - 1
        value = tl.load(held + last, mask=last < rows, other=0x7FFFFFFF)
        below = tl.where(value < wanted, below + step, below)
        step = step // 2
    return below


@triton.jit
def _ones(word):
    """How many bits of int32 words are set: the sum of pairs, of fours, of bytes."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
