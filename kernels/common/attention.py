"""Attention over entries whose visibility is known from lengths and positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# query rows attended at once: bounds the mask at BLOCK x kv_len
BLOCK = 512


class Rules(NamedTuple):
    """What attention does besides scaled products; the defaults change nothing.

    A score s becomes `softcap * tanh(s / softcap)`, then loses `slopes[head] * distance`, then
    gains the bias of its entry. `sinks` [H] are logits that take weight and give nothing. A row
    sees entries less than `window` positions back, in its own `chunk`.
    """

    slopes: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float = 0.0
    window: int | None = None
    chunk: int | None = None

    @property
    def positioned(self) -> bool:
        """Whether positions matter beyond their order."""
        return self.slopes is not None or self.window is not None or self.chunk is not None

    @property
    def plain(self) -> bool:
        """Whether scores are scaled products and weights their softmax."""
        return self.slopes is None and self.sinks is None and not self.softcap

    def scores(self, score: Tensor, distance: Tensor | None, bias: Tensor | None) -> Tensor:
        """Change score [B, K, M, ...] by distance [B, 1 or K, ...] and bias [B, K, ...]."""
        if self.softcap:
            score = self.softcap * torch.tanh(score / self.softcap)
        if self.slopes is not None:
            assert distance is not None
            score = score - self.per_head(self.slopes, score) * distance[:, :, None]
        return score if bias is None else score + bias[:, :, None]

    def weights(self, score: Tensor) -> Tensor:
        """The softmax of score [B, K, M, ..., T] beside the sinks; rows of -inf become zeros."""
        best = score.amax(-1, keepdim=True)
        sink = torch.full_like(best, float("-inf"))
        if self.sinks is not None:
            sink = self.per_head(self.sinks, score).expand_as(best)
            best = torch.maximum(best, sink)
        best = best.masked_fill(best == float("-inf"), 0.0)
        weight = (score - best).exp()
        total = weight.sum(-1, keepdim=True) + (sink - best).exp()
        return weight / total.masked_fill(total == 0.0, 1.0)

    def per_head(self, numbers: Tensor, score: Tensor) -> Tensor:
        """One number per query head [H], shaped to meet score [B, K, M, ...]."""
        trailing = (1,) * (score.dim() - 3)
        return numbers.to(score.dtype).reshape(1, score.shape[1], score.shape[2], *trailing)


PLAIN = Rules()


def attend_step(q: Tensor, k: Tensor, v: Tensor, live: Tensor, scale: float) -> Tensor:
    """Attention of one row q [B, H, 1, D] over the live entries of k, v [B, K, T, D]; live is [B,
    K, T].

    Written as products and sums so that Inductor streams k and v once, fused with whatever produces
    them.
    """
    score = step_scores(q, k, scale).masked_fill(~live[:, :, None], float("-inf"))
    return step_sum(score.softmax(-1), v, live)


def step_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled products of one row q [B, H, 1, D] with k [B, K, T, D]: [B, K, H / K, T]."""
    kv_heads = k.shape[1]
    q = (q * scale).reshape(q.shape[0], kv_heads, q.shape[1] // kv_heads, q.shape[3])
    # one query head at a time: each pass is a plain reduction over contiguous channels
    return torch.stack([(row[:, :, None] * k).sum(-1) for row in q.unbind(2)], dim=2)


def step_sum(weight: Tensor, v: Tensor, live: Tensor) -> Tensor:
    """Values [B, K, T, Dv] summed with weight [B, K, M, T], where live [B, K, T]: [B, K M, 1,
    Dv].
    """
    # zero times garbage may be NaN
    v = v.masked_fill(~live[..., None], 0)
    out = torch.stack([(row[..., None] * v).sum(2) for row in weight.unbind(2)], dim=2)
    return out.flatten(1, 2)[:, :, None]


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    k_past: Tensor,
    v_past: Tensor,
    live: Tensor,
    scale: float,
    rules: Rules = PLAIN,
    past_position: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of S rows over the live past entries and causally over themselves: [B, H, S, Dv].

    q [B, H, S, D], k, v [B, K, S, D], position_ids [B, S]; past k, v [B, K, T, D] with live [B, K,
    T], at past_position [B, 1 or K, T] (None: all of them are seen), with bias [B, K, T]. Padding
    rows (position -1) are not seen, and come out as zeros.
    """
    # zero times garbage may be NaN
    k_past, v_past = (x.masked_fill(~live[..., None], 0) for x in (k_past, v_past))
    keys, values = torch.cat((k_past, k), 2), torch.cat((v_past, v), 2)
    kv_heads, heads, new = k.shape[1], q.shape[1], position_ids[:, None]
    held = new if past_position is None else torch.cat(
        (past_position.expand(-1, kv_heads, -1), new.expand(-1, kv_heads, -1)), 2
    )  # fmt: skip
    if bias is not None:
        bias = torch.cat((bias, bias.new_zeros(k.shape[:3])), 2)
    real = (position_ids >= 0)[:, None, :, None]
    out = []
    for rows in torch.arange(q.shape[2], device=q.device).split(BLOCK):
        asked = new[:, :, rows, None]
        seen = inside(asked, held[:, :, None], rules).expand(-1, kv_heads, -1, -1)
        if past_position is None:
            seen = torch.cat(((live[:, :, None] & real[:, :, rows]), seen), -1)
        else:
            seen = seen & F.pad(live, (0, q.shape[2]), value=True)[:, :, None]
        if rules.plain and bias is None:
            part = masked_attention(q[:, :, rows], keys, values, seen, scale, heads // kv_heads)
        else:
            distance = asked - held[:, :, None]
            part = ruled_attention(q[:, :, rows], keys, values, seen, scale, rules, distance, bias)
        out.append(part)
    return rows_outermost(torch.cat(out, 2))


def rows_outermost(out: Tensor) -> Tensor:
    """The same attention output [B, H, S, Dv], laid out in memory as [B, S, H, Dv]."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def inside(asked: Tensor, held: Tensor, rules: Rules) -> Tensor:
    """The rule `0 <= held <= asked`, less than a window apart, in the same chunk; shapes
    broadcast.
    """
    seen = (held >= 0) & (held <= asked)
    if rules.window is not None:
        seen = seen & (asked - held < rules.window)
    if rules.chunk is not None:
        seen = seen & (asked // rules.chunk == held // rules.chunk)
    return seen


def visible(q_position: Tensor, k_position: Tensor, window: int | None = None) -> Tensor:
    """The rule `0 <= pos_k <= pos_q` and `pos_q - pos_k < window`: [B, S], [B, T] -> [B, S, T]
    bool.
    """
    return inside(q_position[:, :, None], k_position[:, None], Rules(window=window))


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, kv_repeat: int
) -> Tensor:
    """SDPA with a boolean mask per KV head, seen [B, K or 1, S, T]; rows that see nothing come out
    as zeros.
    """
    if seen.shape[1] != 1:
        seen = seen.repeat_interleave(kv_repeat, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=kv_repeat > 1
    )
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def ruled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    rules: Rules,
    distance: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Attention written out, for rules that SDPA does not know: in fp32 (fp64 stays what it is),
    seen [B, K, S, T].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q.unflatten(1, (k.shape[1], -1)).to(dtype)
    score = torch.einsum("bkmsd,bktd->bkmst", rows * scale, k.to(dtype))
    score = rules.scores(score, distance, None if bias is None else bias[:, :, None])
    weight = rules.weights(score.masked_fill(~seen[:, :, None], float("-inf")))
    return torch.einsum("bkmst,bktd->bkmsd", weight, v.to(dtype)).flatten(1, 2).to(q.dtype)
