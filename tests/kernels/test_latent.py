"""The latent room: rows of all heads behind the live entries, in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfx.kernels.dense import reference as dense
from kvfx.kernels.latent import reference as latent

HEADS, CAPACITY, WIDTH = 3, 23, 5


def empty(batch: int) -> tuple[Tensor, Tensor]:
    """A buffer without entries."""
    rows = torch.full((batch, 1, CAPACITY, WIDTH), float("nan"))
    return rows, torch.zeros(batch, HEADS, dtype=torch.int32)


def kept(batch: int, rows: int) -> Tensor:
    """Some rows of each prompt [B, K, S], the same for all heads."""
    return (torch.rand(batch, 1, rows) < 0.6).expand(-1, HEADS, -1)


@pytest.mark.parametrize("pieces", [(7,), (1, 1, 1), (7, 1, 9), (1, 12, 1, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_are_those_of_one_dense_head(batch, pieces):
    torch.manual_seed(sum(pieces))
    rows, length = empty(batch)
    one_head = [*(torch.full_like(rows, float("nan")) for _ in range(2)), length[:, :1].clone()]
    for count in pieces:
        x, keep = torch.randn(batch, 1, count, WIDTH), kept(batch, count)
        verb = "append" if count == 1 else "store"
        getattr(latent, verb)(x, keep, rows, length)
        getattr(dense, verb)(x, x, keep[:, :1], *one_head)
        assert torch.equal(length, one_head[2].expand_as(length))
    live = torch.arange(CAPACITY) < length[:, :1, None]
    assert torch.equal(rows[live], one_head[0][live])
    assert not rows[live].isnan().any()


def test_rows_that_are_not_kept_are_overwritten():
    rows, length = empty(1)
    for number, real in enumerate((True, False, True)):
        x = torch.full((1, 1, 1, WIDTH), float(number))
        latent.append(x, torch.full((1, HEADS, 1), real), rows, length)
    assert rows[0, 0, :2, 0].tolist() == [0, 2]
    assert length.tolist() == [[2] * HEADS]


def test_a_prompt_that_fills_the_buffer():
    rows, length = empty(2)
    x = torch.randn(2, 1, CAPACITY + 4, WIDTH)
    keep = (torch.arange(CAPACITY + 4) >= 4).expand(2, HEADS, -1)
    latent.store(x, keep, rows, length)
    assert torch.equal(rows, x[:, :, 4:])
    assert length.tolist() == [[CAPACITY] * HEADS] * 2
