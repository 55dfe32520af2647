"""Sums over slots that belong to different heads."""

from __future__ import annotations

from torch import Tensor


def softmax(score: Tensor, head: Tensor, kv_heads: int, sinks: Tensor | None) -> Tensor:
    """The softmax of score [B, M, N] among the slots of one head, head [B, N], beside the sinks;
    where all are -inf, zeros.
    """
    whose = head[:, None].expand_as(score)
    sink = score.new_full((*score.shape[:2], kv_heads), float("-inf"))
    if sinks is not None:
        sink = sinks.to(score.dtype).reshape(1, kv_heads, -1).transpose(1, 2).expand_as(sink)
    best = sink.scatter_reduce(2, whose, score, "amax")
    best = best.masked_fill(best == float("-inf"), 0.0)
    weight = (score - best.gather(2, whose)).exp()
    total = (sink - best).exp().scatter_add(2, whose, weight)
    return weight / total.masked_fill(total == 0.0, 1.0).gather(2, whose)
