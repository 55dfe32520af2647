"""Close the gaps that eviction leaves, in place: each program moves its own channels, tile by
tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.rows import live_entries
from kvfx.kernels.compact.configs import Config, config

STYLES = ("half", "interleaved")


def constraint(verb: str, *operands: Tensor | None, style: str = "half") -> str | None:
    """Why the kernels of `verb` ("compact") cannot serve these operands, or None."""
    del verb
    frequencies, k_cache, v_cache = operands[1:4]
    assert k_cache is not None
    assert v_cache is not None
    for cache in (k_cache, v_cache):
        if cache.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"caches are fp32, fp16 or bf16, not {cache.dtype}"
        if cache.stride(3) != 1:
            return "the channels of a cache must lie next to each other"
    if style not in STYLES:
        return f"style is one of {', '.join(STYLES)}, not {style!r}"
    if frequencies is not None and 2 * frequencies.shape[0] > k_cache.shape[3]:
        return f"{frequencies.shape[0]} pairs do not fit into head_dim {k_cache.shape[3]}"
    return launch.unavailable(k_cache.device)


def compact(
    keep: Tensor,
    frequencies: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    *,
    style: str,
) -> None:
    """Move the kept entries of k_cache, v_cache [B, K, C, D] to the front; length [B, K] counts
    them. With `frequencies` [W / 2], keys turn by how far they move.
    """
    reason = constraint("compact", keep, frequencies, k_cache, v_cache, length, style=style)
    launch.require("compact_dense", reason)
    chosen = config(launch.machine(k_cache.device).arch)
    straight = k_cache
    if frequencies is not None and frequencies.shape[0] > 0:
        straight = k_cache[..., 2 * frequencies.shape[0] :]
        _turn(keep, frequencies, k_cache, length, style, chosen)
    for cache in (straight, v_cache):
        if cache.numel() > 0:
            _move(keep, cache, length, chosen)
    length.copy_((keep & live_entries(k_cache, length)).sum(2))


def _move(keep: Tensor, cache: Tensor, length: Tensor, chosen: Config) -> None:
    """Move rows as they are."""
    batch, kv_heads, _, width = cache.shape
    block = chosen.channels(width, cache.element_size())
    launch.run(
        move_kernel, (triton.cdiv(width, block), batch * kv_heads), keep, cache, length,
        *keep.stride(), *cache.stride()[:3], *length.stride(), kv_heads, width,
        WAIT=_waits(cache), BLOCK_T=chosen.tile, BLOCK_D=block, warps=chosen.warps, stages=1,
    )  # fmt: skip


def _turn(
    keep: Tensor, frequencies: Tensor, cache: Tensor, length: Tensor, style: str, chosen: Config
) -> None:
    """Move the rotated channels of rows, and turn them."""
    batch, kv_heads = cache.shape[:2]
    pairs = frequencies.shape[0]
    block = chosen.channels(pairs, cache.element_size())
    launch.run(
        turn_kernel, (triton.cdiv(pairs, block), batch * kv_heads),
        keep, cache, length, turns(frequencies),
        *keep.stride(), *cache.stride()[:3], *length.stride(), kv_heads, pairs,
        HALF=style == "half", WAIT=_waits(cache), BLOCK_T=chosen.tile, BLOCK_P=block,
        warps=chosen.warps, stages=1,
    )  # fmt: skip


def _waits(cache: Tensor) -> bool:
    """Whether kernels have to wait for what they load: AMD's barrier does not."""
    return launch.machine(cache.device).arch.startswith("gfx")


def turns(frequencies: Tensor) -> Tensor:
    """Radians per position as turns per position, in units of 2^-64 turns, whole turns dropped:
    [W / 2, 2] int32, the low and the high word.
    """
    turn = frequencies.double() / (2.0 * math.pi)
    fraction = turn - (turn + 0.5).floor()
    return (fraction * 2.0**64).long().view(torch.int32).unflatten(-1, (-1, 2))


@triton.jit
def move_kernel(
    keep, cache, length,
    keep_batch, keep_head, keep_entry, cache_batch, cache_head, cache_entry,
    length_batch, length_head, kv_heads, width,
    WAIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of channels, row of the batch and KV head."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    keep += batch * keep_batch + head * keep_head
    at_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    cache_at = cache + batch * cache_batch + head * cache_head + at_d[None, :]
    live = tl.load(length + batch * length_batch + head * length_head)
    count = 0
    for start in tl.range(0, live, BLOCK_T):
        entry, target, moved, count = _ranks(keep, keep_entry, start, live, count, BLOCK_T)
        mask = moved[:, None] & (at_d < width)[None, :]
        x = tl.load(cache_at + entry[:, None] * cache_entry, mask=mask, other=0.0)
        x = _arrived(x, WAIT)
        # what this tile overwrites may be its own: all of it is read first
        tl.debug_barrier()
        tl.store(cache_at + target[:, None] * cache_entry, x, mask=mask)


@triton.jit
def turn_kernel(
    keep, cache, length, turns,
    keep_batch, keep_head, keep_entry, cache_batch, cache_head, cache_entry,
    length_batch, length_head, kv_heads, pairs,
    HALF: tl.constexpr, WAIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per block of pairs of channels, row of the batch and KV head."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    keep += batch * keep_batch + head * keep_head
    at_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    low = tl.load(turns + 2 * at_p, mask=at_p < pairs, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(turns + 2 * at_p + 1, mask=at_p < pairs, other=0).to(tl.uint32, bitcast=True)
    cache += batch * cache_batch + head * cache_head
    # neighbours are read together and taken apart in registers
    at_d = tl.program_id(0) * 2 * BLOCK_P + tl.arange(0, 2 * BLOCK_P)
    live = tl.load(length + batch * length_batch + head * length_head)
    count = 0
    for start in tl.range(0, live, BLOCK_T):
        entry, target, moved, count = _ranks(keep, keep_entry, start, live, count, BLOCK_T)
        source = cache + entry[:, None] * cache_entry
        sink = cache + target[:, None] * cache_entry
        # entries move to the front: a turn backwards, in units of 2^-32 turns
        back = tl.where(moved, entry - target, 0).to(tl.uint32)[:, None]
        turn = back * high[None, :] + tl.umulhi(back, low[None, :])  # [BLOCK_T, BLOCK_P]
        cos, sin = _cos_sin(turn)
        sin = -sin
        if HALF:
            mask = moved[:, None] & (at_p < pairs)[None, :]
            a = tl.load(source + at_p[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(source + pairs + at_p[None, :], mask=mask, other=0.0).to(tl.float32)
            a, b = _arrived(a, WAIT), _arrived(b, WAIT)
            # what this tile overwrites may be its own: all of it is read first
            tl.debug_barrier()
            tl.store(
                sink + at_p[None, :], (a * cos - b * sin).to(cache.dtype.element_ty), mask=mask
            )
            b = (b * cos + a * sin).to(cache.dtype.element_ty)
            tl.store(sink + pairs + at_p[None, :], b, mask=mask)
        else:
            mask = moved[:, None] & (at_d < 2 * pairs)[None, :]
            x = tl.load(source + at_d[None, :], mask=mask, other=0.0).to(tl.float32)
            x = _arrived(x, WAIT)
            a, b = tl.split(tl.reshape(x, (BLOCK_T, BLOCK_P, 2)))
            x = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_T, 2 * BLOCK_P))
            tl.debug_barrier()
            tl.store(sink + at_d[None, :], x.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _arrived(x, WAIT: tl.constexpr):
    """The same numbers, once they are in registers."""
    if WAIT:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)", "=v,0", [x], dtype=x.dtype, is_pure=False, pack=PACK
        )
    return x


@triton.jit
def _ranks(keep, keep_entry, start, live, count, BLOCK_T: tl.constexpr):
    """The tile's entries, where they go, which of them move, and how many are kept up to here."""
    entry = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
    kept = tl.load(keep + entry * keep_entry, mask=entry < live, other=0).to(tl.int32)
    target = (count + tl.cumsum(kept, 0) - 1).to(tl.int64)
    return entry, target, (kept != 0) & (target != entry), count + tl.sum(kept, 0)


@triton.jit
def _cos_sin(turn):
    """Cosine and sine of angles in units of 2^-32 turns, uint32 that wrap, to fp32 rounding.

    The nearest quarter is taken out in integers, so nothing is lost however large the angle was.
    """
    quarter = (turn + 0x20000000) >> 30
    # 2 pi / 2^32
    x = (turn - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    square = x * x
    sin = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square
    sin = sin * x + x
    cos = ((2.4433157118e-5 * square - 1.3887316255e-3) * square + 4.1666645683e-2) * square
    cos = cos * square - 0.5 * square + 1.0
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, -sin, cos), tl.where(odd, cos, sin)
    opposite = (quarter & 2) != 0
    return tl.where(opposite, -cos, cos), tl.where(opposite, -sin, sin)
