"""The launch of attention over codes and rings: into how many parts, in which blocks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.attention import Rules
from kvfx.kernels.common.combine import workspace
from kvfx.kernels.kivi.configs import config, serves, with_rules, with_scores
from kvfx.kernels.kivi.layout import Entries, Planes
from kvfx.kernels.kivi.triton_attend import attend_kernel
from kvfx.kernels.kivi.triton_unpack import instructions

# query rows and heads in one block, as rows of a product (also what one sums over, at least) or as
# its columns
WIDE, NARROW = 16, 8
# tiles whose zeros are multiplied at once
CHUNK = 32
# tokens that are read one by one at once: what a product sums over, at least
TOKENS = 16
# parts for what is left over: rings, and tiles that fill no step; reading them takes long
TAILS = 4
# programs that a multiprocessor holds
RESIDENT = 3


def attend_cache(
    q: Tensor, position_ids: Tensor | None, has: Entries, scale: float,
    k_bits: int, v_bits: int, group_size: int, rule: str, rules: Rules, *, more: int,
    position: Tensor | None = None, bias: Tensor | None = None, scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The parts of attention of q [B, H, S, D] over the live entries, with room for `more`.

    `scale` gives scores in base 2. Rows at a negative position (None: there are none) see nothing.
    Entries are at `position` [B, K, N] (None: at their index) and carry `bias` [B, K, N]. `scores`
    [B, H, N] fp32 get the scores of the only row.
    """
    batch, heads, rows, width = q.shape
    kv_heads, tiles = has.k_codes.shape[1:3]
    value_width, repeat = has.v_residual.shape[3], heads // kv_heads
    k_planes, v_planes = Planes(k_bits, width, group_size), Planes(v_bits, value_width, group_size)
    machine = launch.machine(q.device)
    exact, arch = q.dtype == torch.float32, machine.arch
    fast = serves(arch, (width, value_width, group_size), exact=exact)
    # few heads beside many codes per byte: the codes are the wide side
    narrow = rows * repeat <= NARROW and k_bits == v_bits == 2 and width == value_width
    block = NARROW if narrow else WIDE
    blocks = triton.cdiv(rows * repeat, block)
    chosen = config(
        arch, k_bits, v_bits, group_size, max(width, value_width), fast=fast, narrow=narrow
    )
    positioned = position is not None or rules.positioned
    ruled = positioned or bias is not None or bool(rules.softcap)
    entries = tiles * group_size + has.k_residual.shape[2]
    if scores is not None:
        chosen = with_scores(chosen)
    if ruled:
        chosen = with_rules(chosen, arch)
    # as many tiles as give a product enough rows to sum over
    pack = max(1, WIDE // min(k_planes.rows, v_planes.rows)) if fast else 1
    step = pack * chosen.blocks
    programs = batch * kv_heads * blocks
    tails = TAILS if fast else 0
    parts = tails + launch.parts(programs, max(tiles // step, 2), machine.processors, RESIDENT)
    partial, stats = workspace(q, parts + more, value_width)
    zeros = torch.empty(programs * parts * CHUNK * block, dtype=torch.float32, device=q.device)
    mixed = rule == "kivi" or not fast or step > 1
    asm = arch.startswith("sm")
    launch.run(
        attend_kernel, (blocks * parts, batch * kv_heads),
        q, *has, None if position_ids is None else position_ids.contiguous(), zeros, partial, stats,
        scores, _beside(position, has, entries), _beside(bias, has, entries), rules.slopes,
        rules.softcap or None, rules.window, rules.chunk,
        None if scores is None and not ruled else entries,
        scale, q.stride(0), q.stride(1), q.stride(2), kv_heads, rows, tiles,
        has.k_residual.shape[2], has.v_residual.shape[2], parts, stats.shape[1],
        REPEAT=repeat, WIDTH=width, VALUE_WIDTH=value_width, GROUP=group_size,
        K_BITS=k_bits, K_PLANES=k_planes.planes,
        K_ASM=instructions(k_bits, k_planes.planes) if asm else "",
        V_BITS=v_bits, V_PLANES=v_planes.planes,
        V_ASM=instructions(v_bits, v_planes.planes) if asm else "",
        TAILS=tails, NARROW=narrow, EXACT=exact, MIXED=mixed, RULED=ruled,
        POSITIONED=positioned,
        BLOCK_M=block, BLOCK_N=TOKENS, BLOCK_D=triton.next_power_of_2(width),
        BLOCK_V=triton.next_power_of_2(value_width), PACK=pack, BLOCKS=chosen.blocks,
        CHUNK=CHUNK, STAGES=chosen.stages, warps=chosen.warps, stages=chosen.stages,
    )  # fmt: skip
    return partial, stats


def _beside(number: Tensor | None, has: Entries, entries: int) -> Tensor | None:
    """Numbers [B, 1 or K, N] beside entries, in one piece."""
    if number is None:
        return None
    return number.expand(*has.length.shape, entries).contiguous()
