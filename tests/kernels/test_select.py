"""The select room: who is kept, against the same choice made with Python's sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfx.kernels.select.reference import allocate_uniform, hold_back, select_recent, select_top

ROWS = st.lists(
    st.lists(st.tuples(st.booleans(), st.integers(-2, 2)), min_size=13, max_size=13),
    min_size=2,
    max_size=2,
)


def chosen(live: list[bool], score: list[float], count: int, sinks: int, recent: int) -> list[bool]:
    """The first `sinks` and last `recent` live rows, then by score, the smaller index first."""
    index = [i for i, alive in enumerate(live) if alive]
    protected = set(index[:sinks]) | set(index[len(index) - recent :] if recent else [])
    ranked = sorted(
        index, key=lambda i: (i not in protected, -score[i] if i not in protected else 0, i)
    )
    return [i in ranked[:count] for i in range(len(live))]


@given(ROWS, st.integers(0, 15), st.integers(0, 3), st.integers(0, 3))
def test_select_top(rows, count, sinks, recent):
    live = torch.tensor([[alive for alive, _ in row] for row in rows])[:, None]
    score = torch.tensor([[float(s) for _, s in row] for row in rows])[:, None]
    keep = select_top(score, live, torch.full((2, 1), count), sinks, recent)
    for row, found in zip(rows, keep[:, 0].tolist(), strict=True):
        alive, scores = [a for a, _ in row], [float(s) for _, s in row]
        assert found == chosen(alive, scores, count, sinks, recent)


@given(ROWS, st.integers(1, 15), st.integers(0, 4))
def test_select_recent(rows, count, sinks):
    live = torch.tensor([[alive for alive, _ in row] for row in rows])[:, None]
    keep = select_recent(live, torch.full((2, 1), count), sinks)
    for row, found in zip(rows, keep[:, 0].tolist(), strict=True):
        index = [i for i, (alive, _) in enumerate(row) if alive]
        first = min(sinks, count)
        newest = index[max(len(index) - (count - first), 0) :] if count > first else []
        wanted = set(index[:first]) | set(newest)
        assert found == [i in wanted for i in range(13)]
        assert sum(found) == min(count, len(index))


@pytest.mark.parametrize("select", ["top", "recent"])
def test_enough_keeps_all(select):
    live = torch.rand(3, 2, 33) < 0.6
    for count in (live.sum(-1), live.sum(-1) + 5):
        keep = (
            select_recent(live, count, sinks=4)
            if select == "recent"
            else select_top(torch.randn(3, 2, 33), live, count, 4, 3)
        )
        assert torch.equal(keep, live)


def test_heads_have_their_own_counts():
    live = torch.ones(1, 3, 9, dtype=torch.bool)
    count = torch.tensor([[2, 5, 9]])
    assert select_recent(live, count, sinks=1).sum(-1).tolist() == [[2, 5, 9]]
    assert select_top(torch.randn(1, 3, 9), live, count, 1, 1).sum(-1).tolist() == [[2, 5, 9]]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_scores_of_dead_rows_are_ignored(garbage):
    live = torch.tensor([[[False, True, True, False, True]]])
    score = torch.tensor([[[garbage, 1.0, 3.0, garbage, 2.0]]])
    keep = select_top(score, live, torch.tensor([[2]]), sinks=0, recent=0)
    assert keep.tolist() == [[[False, False, True, False, True]]]


def test_equal_scores_prefer_the_smaller_index():
    live = torch.ones(1, 1, 200, dtype=torch.bool)
    keep = select_top(torch.zeros(1, 1, 200), live, torch.tensor([[7]]), sinks=0, recent=2)
    assert keep[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 198, 199]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_scores_rank_too(dtype):
    score = torch.tensor([[[1.0, -2.0, 5.0, 0.5]]], dtype=dtype)
    live = torch.ones(1, 1, 4, dtype=torch.bool)
    assert select_top(score, live, torch.tensor([[2]]), 0, 0).tolist() == [
        [[True, False, True, False]]
    ]


@pytest.mark.parametrize(
    ("fraction", "entries", "least"),
    [(0.25, 0, 1), (0.3, 0, 5), (1.0, 12, 1), (1.0, 2, 5)],
    ids=str,
)
def test_allocate_uniform(fraction, entries, least):
    tokens = torch.tensor([1, 4, 9, 63, 1000])
    count = allocate_uniform(tokens, 3, fraction, entries, least)
    wanted = [max(entries or math.ceil(fraction * n), least) for n in tokens.tolist()]
    assert count.tolist() == [[n] * 3 for n in wanted]


def test_rows_are_held_back_until_they_are_due():
    live = torch.arange(9) < torch.tensor([[[5], [6]], [[8], [0]]])
    count = torch.tensor([[4, 4], [4, 4]])
    assert hold_back(live, count, interval=2).tolist() == [[5, 4], [4, 0]]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.55, 0.7])
def test_the_host_counts_alike(fraction):
    """Schedules count on the host what the op counts on the device."""
    tokens = torch.arange(1, 3000)
    wanted = [math.ceil(fraction * n) for n in tokens.tolist()]
    assert allocate_uniform(tokens, 1, fraction, 0, 1)[:, 0].tolist() == wanted
