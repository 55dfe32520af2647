"""Attention under the rules of a model, for blocks of rows: by positions or by the model's mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.kernels.common.attention import (
    BLOCK,
    Rules,
    inside,
    masked_attention,
    rows_outermost,
    ruled_attention,
    step_scores,
    step_sum,
)


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, asked: Tensor, held: Tensor, scale: float, rules: Rules
) -> Tensor:
    """Attention [B, H, S, Dv] of rows q [B, H, S, D] at positions asked [B, S] over keys and values
    [B, K, T, D] at held [B or 1, T]. Rows that see nothing come out as zeros.
    """
    asked, held = asked[:, None, :, None], held[:, None, None]
    seen = inside(asked, held, rules)
    if rules.plain:
        return masked_attention(q, k, v, seen, scale, q.shape[1] // k.shape[1])
    return ruled_attention(q, k, v, seen, scale, rules, asked - held, None)


def attend_ruled_step(
    q: Tensor, k: Tensor, v: Tensor, live: Tensor, distance: Tensor, scale: float, rules: Rules
) -> Tensor:
    """What `attend_step` computes, under any rules: live [B, K, T] at a distance [B, 1 or K, T]
    from the row; fp32 inside.
    """
    score = rules.scores(step_scores(q.float(), k.float(), scale), distance, None)
    weight = rules.weights(score.masked_fill(~live[:, :, None], float("-inf")))
    return step_sum(weight, v.float(), live).to(q.dtype)


def shares(score: Tensor, unseen: Tensor, distance: Tensor | None, rules: Rules) -> Tensor:
    """The weights [B, K, M, S, T] of scaled products, which are overwritten; what is unseen [B, K
    or 1, 1, S, T] gets none. Slopes want the distance [B, K or 1, S, T].
    """
    if rules.plain:
        # rows that see nothing are no numbers
        return score.masked_fill_(unseen, float("-inf")).softmax(-1)
    return rules.weights(rules.scores(score, distance, None).masked_fill_(unseen, float("-inf")))


def attend_by_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, rules: Rules
) -> Tensor:
    """Attention [B, H, S, Dv] of q [B, H, S, D] over k, v [B, K, T, D] under a mask [B or 1, H or
    1, S, T], boolean (True: seen) or additive; None is causal.

    Of the rules, soft-cap (before the mask is added) and sinks apply: the others are in the mask.
    """
    kv_heads, repeat = k.shape[1], q.shape[1] // k.shape[1]
    if rules.plain:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=repeat > 1
        )
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    mask = mask.broadcast_to(*q.shape[:3], k.shape[2]).unflatten(1, (kv_heads, repeat))
    keys, values, out = k.float(), v.float(), []
    for rows in torch.arange(q.shape[2], device=q.device).split(BLOCK):
        asked = q[:, :, rows].unflatten(1, (kv_heads, repeat)).float() * scale
        score = rules.scores(torch.einsum("bkmsd,bktd->bkmst", asked, keys), None, None)
        given = mask[:, :, :, rows]
        if mask.dtype == torch.bool:
            score = score.masked_fill(~given, float("-inf"))
        else:
            score = score + given.float()
        part = torch.einsum("bkmst,bktd->bkmsd", rules.weights(score), values)
        out.append(part.flatten(1, 2).to(q.dtype))
    return rows_outermost(torch.cat(out, 2))
