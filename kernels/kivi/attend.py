"""One row of attention straight from packed codes, written so that Inductor streams the words once.

With key = code * scale + zero, `q . key = (q * scale) . code + q . zero`: a tile's scale goes into
the query, and its zero becomes one number. With value = code * scale + zero, a token's scale goes
into its weight. What is left per element is shift, mask, convert, multiply-add.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvfx.kernels.kivi.layout import Entries, Planes, Schedule, ring_tokens
from kvfx.kernels.kivi.rules import Ruled, weights

# int16 lanes of an int32: Inductor vectorizes 32-bit integers, not 16-bit ones
LANES = 2


def attend_step(
    q: Tensor, has: Entries, due: Schedule, scale: float, k_bits: int, v_bits: int,
    group_size: int, given: Ruled | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one row q [B, H, 1, D], [B, H, 1, Dv], and its weights [B, K, H / K, N]: those
    of all codes, then those of the slots of the ring of keys.
    """
    # all but batch and tiles is static, also when traced with symbolic shapes
    kv_heads, head_dim = int(has.k_residual.shape[1]), int(has.k_residual.shape[3])
    value_dim = int(has.v_residual.shape[3])
    row = (q.float() * scale).reshape(q.shape[0], kv_heads, -1, head_dim)
    coded = torch.arange(has.k_scales.shape[2] * group_size, device=q.device)

    k_planes = Planes(k_bits, head_dim, group_size)
    score = scores_of_codes(row, has.k_codes, has.k_scales, has.k_zeros, k_planes)
    score = score.masked_fill(~(coded < has.k_quantized[..., None])[:, :, None], float("-inf"))
    live = ring_tokens(has.length, due.k_ring) >= has.k_quantized[..., None]
    exact = [(x[:, :, None] * has.k_residual.float()).sum(-1) for x in row.unbind(2)]
    exact = torch.stack(exact, 2).masked_fill(~live[:, :, None], float("-inf"))
    score = torch.cat((score, exact), -1)
    weight = score.softmax(-1) if given is None else weights(score, has, due, given)

    live = coded < has.v_quantized[..., None]
    v_planes = Planes(v_bits, value_dim, group_size)
    old = weight[..., : coded.shape[0]]
    out = sum_of_codes(old, has.v_codes, has.v_scales, has.v_zeros, live, v_planes)
    # a value may be exact while its key is a code already: where the weights of its slots lie
    token = ring_tokens(has.length, due.v_ring)
    ring = coded.shape[0] + token % due.k_ring
    at = torch.where(token < has.k_quantized[..., None], token.clamp(min=0), ring)
    new = weight.gather(-1, at[:, :, None].expand(-1, -1, row.shape[2], -1))
    live = token >= has.v_quantized[..., None]
    values = torch.where(live[..., None], has.v_residual.float(), 0.0)
    new = torch.where(live[:, :, None], new, 0.0)
    out = out + torch.stack([(x[..., None] * values).sum(2) for x in new.unbind(2)], 2)
    return out.reshape(q.shape[0], q.shape[1], 1, value_dim).to(q.dtype), weight


def weights_of_entries(weight: Tensor, has: Entries, due: Schedule) -> Tensor:
    """Weights [B, K, N] of codes and slots as those of entries by position [B, K, N]; 0 beyond."""
    entry = torch.arange(weight.shape[2], device=weight.device)
    coded = weight.shape[2] - due.k_ring
    old = entry < has.k_quantized[..., None]
    at = torch.where(old, entry.clamp(max=max(coded - 1, 0)), coded + entry % due.k_ring)
    return weight.gather(2, at).masked_fill(entry >= has.length[..., None], 0.0)


def scores_of_codes(
    q: Tensor, k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, planes: Planes
) -> Tensor:
    """Scores of a scaled row q with the quantized keys: [B, K, M, D] -> [B, K, M, tiles * G]."""
    words = k_codes.view(torch.int32)
    per_tile = q[:, :, :, None]
    # stacking makes Inductor store the folded query once, with contiguous lanes
    folded = (per_tile * k_scales[:, :, None].float()).unflatten(-1, (planes.planes, -1, LANES))
    folded = torch.stack(folded.unbind(-1), -2)[:, :, :, :, None]
    offset = (per_tile * k_zeros[:, :, None].float()).sum(-1)[..., None, None]
    heads = []
    for head in range(q.shape[2]):
        parts = []
        for part in range(planes.parts):
            products = [
                codes_at(words, planes, part, plane, lane) * folded[:, :, head, :, :, plane, lane]
                for plane in range(planes.planes)
                for lane in range(LANES)
            ]
            parts.append(sum(products[1:], products[0]).sum(-1))
        heads.append(torch.stack(parts, 3))
    return (torch.stack(heads, 2) + offset).flatten(3)


def sum_of_codes(
    weight: Tensor, v_codes: Tensor, v_scales: Tensor, v_zeros: Tensor, live: Tensor, planes: Planes
) -> Tensor:
    """Quantized values summed with weight [B, K, M, T]: [B, K, M, D].

    Where live [B, K, T] is false, scales and zeros are garbage.
    """
    words = v_codes.view(torch.int32)
    groups = v_scales.shape[-1]
    group_size = planes.width // groups
    # runs of channels that share a word row, a plane and a group
    run = math.gcd(planes.words, group_size)
    runs = planes.words // run
    seen = live.unflatten(-1, v_scales.shape[2:4])
    heads = []
    for row in weight.unbind(2):
        row = row.unflatten(-1, v_scales.shape[2:4])
        scaled = [torch.where(seen, row * scale, 0.0) for scale in v_scales.float().unbind(-1)]
        offset = torch.where(seen[..., None], row[..., None] * v_zeros.float(), 0.0).sum(3).sum(2)
        pieces = []
        for plane in range(planes.planes):
            for start in range(0, planes.words, run):
                group = (plane * planes.words + start) // group_size
                by_part = scaled[group].unflatten(-1, (planes.parts, planes.rows)).unbind(3)
                part_words = words[..., start // LANES : (start + run) // LANES]
                for lane in range(LANES):
                    products = [
                        codes_at(part_words, planes, part, plane, lane) * by_part[part][..., None]
                        for part in range(planes.parts)
                    ]
                    pieces.append(sum(products[1:], products[0]).sum(3).sum(2))
        # [B, K, run, lane, pair] -> channels
        out = (
            torch.stack(pieces, 2)
            .unflatten(2, (planes.planes * runs, LANES))
            .transpose(-1, -2)
            .flatten(2)
        )
        heads.append(out + offset.repeat_interleave(group_size, -1))
    return torch.stack(heads, 2)


def codes_at(words: Tensor, planes: Planes, part: int, plane: int, lane: int) -> Tensor:
    """The codes of one part, plane and lane of int32 words, as fp32."""
    return ((words >> (16 * lane + planes.shift(part, plane))) & planes.mask).float()
