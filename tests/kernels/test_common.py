"""Shared arithmetic: visibility, order of kept rows, and where an entry will lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfx.kernels.common.attention import (
    BLOCK,
    attend_rows,
    attend_step,
    masked_attention,
    rows_outermost,
    visible,
)
from kvfx.kernels.common.rows import entry_shift, kept_first, live_rows, position_rows

POSITIONS = st.lists(st.integers(-1, 12), min_size=1, max_size=8)


@given(POSITIONS, POSITIONS, st.none() | st.integers(1, 9))
def test_visible(queries, keys, window):
    seen = visible(torch.tensor([queries]), torch.tensor([keys]), window)
    for i, q in enumerate(queries):
        for j, k in enumerate(keys):
            expected = 0 <= k <= q and (window is None or q - k < window)
            assert bool(seen[0, i, j]) is expected


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_kept_first(keep):
    order, count = kept_first(torch.tensor(keep)[None, None])
    kept = [i for i, k in enumerate(keep) if k]
    assert count.item() == len(kept)
    assert order[0, 0].tolist() == kept + [i for i, k in enumerate(keep) if not k]


def test_live_rows():
    live = live_rows(torch.tensor([[-1, 0, 1], [4, 5, 6]]), 2)
    assert live.tolist() == [[[False, True, True]] * 2, [[True] * 3] * 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_position_rows(dtype):
    rows = position_rows(torch.tensor([[-1, 0, 1], [4, 5, 6]], dtype=dtype), 2)
    assert rows.tolist() == [[[-1, 0, 1]] * 2, [[4, 5, 6]] * 2]
    assert rows.dtype == dtype


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 5), st.integers(0, 9))
def test_entry_shift(keep, length, start):
    """A kept row at position p, shifted, stands at the index of its entry."""
    positions = torch.arange(len(keep))[None] + start
    mask = torch.tensor(keep)[None, None]
    shift = entry_shift(mask, positions, torch.tensor([[length]], dtype=torch.int32))
    target = (positions + shift[0])[0][mask[0, 0]].tolist()
    assert target == list(range(length, length + sum(keep)))
    of_cache = entry_shift(mask, None, None)
    index = (torch.arange(len(keep)) + of_cache[0, 0])[mask[0, 0]].tolist()
    assert index == list(range(sum(keep)))


def test_a_row_that_sees_nothing_is_zero():
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    seen = torch.ones(1, 2, 3, 5, dtype=torch.bool)
    seen[:, 1, 2] = False
    out = masked_attention(q, k, k, seen, 0.3, 2)
    assert not out[:, 2:, 2].any()
    assert out[:, :2].all()
    assert out.isfinite().all()


@pytest.mark.parametrize("repeat", [1, 2, 3, 4])
def test_one_row_is_the_last_of_many(repeat):
    q = torch.randn(2, 2 * repeat, 1, 8)
    k, v = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
    live = torch.rand(2, 2, 9) < 0.7
    live[..., 0] = True
    expected = masked_attention(q, k, v, live[:, :, None], 0.3, repeat)
    torch.testing.assert_close(attend_step(q, k, v, live, 0.3), expected)


def test_rows_are_attended_in_blocks():
    rows = BLOCK + 1
    q, k = torch.randn(1, 1, rows, 4), torch.randn(1, 1, rows, 4)
    past, live = torch.randn(1, 1, 3, 4), torch.tensor([[[True, False, True]]])
    out = attend_rows(q, k, k, torch.arange(rows)[None] + 3, past, past, live, 0.3)
    index = torch.arange(rows)
    own = (index[:, None] >= index)[None, None]
    seen = torch.cat((live[:, :, None].expand(-1, -1, rows, -1), own), -1)
    keys = torch.cat((past, k), 2)
    torch.testing.assert_close(out, masked_attention(q, keys, keys, seen, 0.3, 1))


def test_padding_rows_come_out_as_zeros():
    q, k, past = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 3, 8)
    live = torch.ones(1, 2, 3, dtype=torch.bool)
    out = attend_rows(q, k, k, torch.tensor([[-1, -1, 3, 4]]), past, past, live, 0.3)
    assert not out[:, :, :2].any()
    assert out[:, :, 2:].all()


def test_rows_outermost_changes_memory_only():
    x = torch.randn(2, 3, 5, 4)
    out = rows_outermost(x)
    assert torch.equal(out, x)
    assert out.transpose(1, 2).is_contiguous()
