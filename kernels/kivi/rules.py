"""Rules of attention over codes and slots: which entry a column of scores belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvfx.kernels.common.attention import Rules, inside
from kvfx.kernels.kivi.layout import Entries, Schedule, ring_tokens


class Ruled(NamedTuple):
    """Rules, the position of the row that asks [B, 1], and the numbers beside entries [B, K, N]."""

    rules: Rules
    asked: Tensor
    position: Tensor | None
    bias: Tensor | None


def ruled(
    rules: Rules, asked: Tensor, position: Tensor | None, bias: Tensor | None
) -> Ruled | None:
    """What changes the weights of one row, or None: entries never come after it."""
    if rules.plain and not rules.positioned and bias is None:
        return None
    return Ruled(rules, asked, position, bias)


def weights(score: Tensor, has: Entries, due: Schedule, given: Ruled) -> Tensor:
    """Weights [B, K, M, N] of scores of all codes, then of the slots of the ring of keys."""
    entry = entries_of_columns(score.shape[-1] - due.k_ring, has, due)
    live, at = entry >= 0, entry.clamp(min=0)
    held = entry if given.position is None else beside(given.position, at).long()
    asked = given.asked[:, None]
    if given.rules.positioned or given.position is not None:
        live = live & inside(asked, held, given.rules)
    bias = None if given.bias is None else beside(given.bias, at)
    score = given.rules.scores(score, asked - held, bias)
    return given.rules.weights(score.masked_fill(~live[:, :, None], float("-inf")))


def entries_of_columns(coded: int, has: Entries, due: Schedule) -> Tensor:
    """The entry of each of `coded` codes and of each slot [B, K, N], int64; -1: not live."""
    code = torch.arange(coded, device=has.length.device)
    quantized = has.k_quantized[..., None]
    slot = ring_tokens(has.length, due.k_ring)
    return torch.cat(
        (torch.where(code < quantized, code, -1), torch.where(slot >= quantized, slot, -1)), -1
    )


def beside(number: Tensor, at: Tensor) -> Tensor:
    """Numbers [B, 1 or K, N] of the entries `at` [B, K, N]."""
    return number.expand(*at.shape[:2], -1).gather(-1, at)
