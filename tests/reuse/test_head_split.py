"""Heads on several devices: each scores rows by its own KV heads, and the sum of the scores chooses
the rows that all heads together choose (specs/reuse.md 4.3). One process stands for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from kvfx.kernels.reuse.reference import (
    choose_rows,
    column_attention,
    row_deviation,
    scatter_rows,
    weigh_rows,
)
from kvfx.passes.insert_reuse import KINDS

WIDTH = 8
# sums over heads in another order, relative to the largest score
ROUNDING = 1e-6
kinds = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Heads:
    """Fresh q [B, H, S, D], k and v [B, K, S, D] of some heads, and the live rows [B, K, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_rows: Tensor
    v_rows: Tensor

    def split(self, devices: int) -> list[Heads]:
        """The heads of each device: KV heads in order, with the query heads that read them."""
        parts = [getattr(self, field.name).chunk(devices, 1) for field in fields(self)]
        return [Heads(*each) for each in zip(*parts, strict=True)]


def score(heads: Heads, kind: str, positions: Tensor, window: int | None) -> Tensor:
    """What these heads add to the score [B, S] of each row, as `insert_reuse` builds it."""
    new, old = (heads.k, heads.k_rows) if kind == "keys" else (heads.v, heads.v_rows)
    if kind != "attention":
        return row_deviation(new, old, positions, norm="l2").sum(1)
    deviation = row_deviation(new, old, positions, norm="l1")
    k_rows, v_rows = heads.k_rows.clone(), heads.v_rows.clone()
    scatter_rows(heads.k, heads.v, positions, k_rows, v_rows)
    received = column_attention(heads.q, k_rows, positions, scale=WIDTH**-0.5, window=window)
    return weigh_rows(deviation, received, positions)


def drawn(seed: int, batch: int, kv_heads: int, repeat: int, rows: int, room: int) -> Heads:
    """Heads that differ in size, so that none decides for all."""
    draw = torch.Generator().manual_seed(seed)

    def normal(heads: int, count: int) -> Tensor:
        return torch.randn(batch, heads, count, WIDTH, generator=draw)

    sizes = 1.5 ** torch.randn(1, kv_heads, 1, 1, generator=draw)
    new = [normal(kv_heads, rows) * sizes for _ in range(2)]
    old = [normal(kv_heads, room) * sizes for _ in range(2)]
    return Heads(normal(kv_heads * repeat, rows), *new, *old)


@st.composite
def cases(draw):
    """Heads, the positions of their rows, and which rows must and may be chosen, how many."""
    rows = draw(st.integers(2, 13))
    room = rows + draw(st.integers(0, 5))
    batch, devices = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
    kv_heads = devices * draw(st.integers(1, 2))
    seed = draw(st.integers(0, 999))
    heads = drawn(seed, batch, kv_heads, draw(st.integers(1, 3)), rows, room)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(room, generator=generator)[:rows] for _ in range(batch)])
    positions = order.sort(1).values
    # padding in front, in some of the cases
    positions[:, : draw(st.integers(0, rows // 2))] = -1
    must = torch.zeros(batch, rows, dtype=torch.bool)
    must[:, -1] = True
    may = ~must & (positions >= 0)
    return heads, devices, positions, must, may, draw(st.integers(1, rows))


@kinds
@given(case=cases(), window=st.sampled_from([None, 4]))
def test_summed_scores_choose_what_all_heads_choose(kind, case, window):
    heads, devices, positions, must, may, keep = case
    together = score(heads, kind, positions, window)
    parts = [score(part, kind, positions, window) for part in heads.split(devices)]
    summed = torch.stack(parts).sum(0)
    assert bool(((summed - together).abs() <= ROUNDING * together.abs().max()).all())
    ranked = together.masked_fill(~may, float("-inf")).sort(1, descending=True).values
    gaps = ranked[:, :-1] - ranked[:, 1:]
    # of two rows with one score, rounding decides
    assume(not bool((gaps <= 4 * ROUNDING * together.abs().max()).any()))
    slots = torch.empty(keep)
    found = choose_rows(summed, must, may, slots)
    assert torch.equal(found, choose_rows(together, must, may, slots))


@kinds
def test_one_part_of_the_heads_chooses_other_rows(kind):
    """Scores that are not summed are not those of all: devices would compute different rows."""
    positions = torch.arange(60)[None]
    heads = drawn(0, 1, 4, 2, 60, 60)
    must = positions == 59
    slots = torch.empty(12)
    chosen = set()
    for part in (heads, *heads.split(2)):
        found = choose_rows(score(part, kind, positions, None), must, ~must, slots)
        chosen.add(tuple(found[0].tolist()))
    assert len(chosen) == 3


@given(case=cases(), window=st.sampled_from([None, 4]))
def test_what_a_device_knows_of_its_heads_is_what_all_know_of_them(case, window):
    """Deviations and attention are per KV head: those of a part are that part of all."""
    heads, devices, positions, *_ = case
    found = [
        column_attention(part.q, part.k_rows, positions, scale=0.3, window=window)
        for part in heads.split(devices)
    ]
    together = column_attention(heads.q, heads.k_rows, positions, scale=0.3, window=window)
    assert float((torch.cat(found, 1) - together).abs().max()) <= ROUNDING * positions.shape[1]
    for norm in ("l1", "l2"):
        found = [
            row_deviation(part.v, part.v_rows, positions, norm=norm)
            for part in heads.split(devices)
        ]
        expected = row_deviation(heads.v, heads.v_rows, positions, norm=norm)
        assert torch.equal(torch.cat(found, 1), expected)


@kinds
@pytest.mark.parametrize("devices", [2, 4])
def test_equal_scores_go_to_the_smaller_index_on_every_device(kind, devices):
    """Rows that are alike in all heads: no device may break the tie in its own way."""
    positions = torch.arange(9)[None]
    heads = drawn(3, 1, 4, 1, 9, 9)
    heads.v_rows.copy_(heads.v)
    heads.k_rows.copy_(heads.k)
    summed = torch.stack([score(part, kind, positions, None) for part in heads.split(devices)])
    must = positions == 8
    found = choose_rows(summed.sum(0), must, ~must, torch.empty(4))
    assert found.tolist() == [[0, 1, 2, 8]]
