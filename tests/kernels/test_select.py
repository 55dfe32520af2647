"""The select room: who is kept, against the same choice made with Python's sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfx.kernels.select.reference import (
    allocate_heads,
    allocate_uniform,
    hold_back,
    select_chunks,
    select_recent,
    select_top,
)

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
    live = torch.arange(9) < torch.tensor([[[5], [5]], [[6], [6]], [[5], [6]], [[9], [3]]])
    count = torch.tensor([[4, 4], [4, 4], [4, 4], [4, 4]])
    # heads of different length are due together, once they hold too much on average
    wanted = [[5, 5], [4, 4], [5, 6], [4, 4]]
    assert hold_back(live, count, interval=2).tolist() == wanted


def ragged(batch: int, heads: int, rows: int) -> torch.Tensor:
    """Live rows that differ between rows of the batch and heads, none for some."""
    live = torch.rand(batch, heads, rows) < torch.rand(batch, heads, 1)
    live[0, 0] = False
    return live


def allocated(
    score: torch.Tensor, live: torch.Tensor, count: list[int], knobs: tuple[int, int, float, float]
) -> list[int]:
    """The same for one row [K, T], taken one by one."""
    sinks, recent, share, floor = knobs
    ranks, own = [], []
    for values, alive, n in zip(score.tolist(), live.tolist(), count, strict=True):
        index = [i for i, a in enumerate(alive) if a]
        last = recent + math.floor(n * share)
        protected = sorted({*index[:sinks], *index[max(len(index) - last, 0) :]})
        others = sorted((i for i in index if i not in protected), key=lambda i: (-values[i], i))
        uniform = min(n, len(index))
        held = min(len(protected), uniform)
        own.append(held + math.floor((uniform - held) * floor))
        ranks.append([(-math.inf, i) for i in protected] + [(-values[i], i) for i in others])
    total = min(sum(count), sum(map(len, ranks)))
    left = sorted(
        (*key, head)
        for head, rank in enumerate(ranks)
        for key in rank[own[head] :]
    )[: total - sum(own)]  # fmt: skip
    return [n + sum(head == key[2] for key in left) for head, n in enumerate(own)]


@pytest.mark.parametrize("ties", [False, True], ids=["scores", "ties"])
@pytest.mark.parametrize(
    "knobs",
    [(0, 0, 0.0, 0.2), (1, 2, 0.0, 0.5), (2, 1, 0.25, 0.0), (4, 8, 0.0, 1.0), (20, 20, 0.0, 0.2)],
    ids=str,
)
def test_allocate_heads(knobs, ties):
    for _ in range(10):
        live, count = ragged(3, 4, 33), torch.randint(0, 36, (3, 4))
        score = torch.randint(0, 3, live.shape).float() if ties else torch.randn(live.shape)
        found = allocate_heads(score.masked_fill(~live, float("nan")), live, count, *knobs)
        assert found.dtype == torch.int64
        for row in range(3):
            expected = allocated(score[row], live[row], count[row].tolist(), knobs)
            assert found[row].tolist() == expected
        assert torch.equal(found.sum(1), torch.minimum(count.sum(1), live.sum((1, 2))))
        assert bool((found <= live.sum(-1)).all())


def test_a_flat_head_gets_more_than_a_peaked_one():
    """Ada-KV's point: what a peaked head needs is few entries."""
    weight = torch.stack((torch.full((100,), 0.01), torch.full((100,), 1e-4)))
    weight[1, 7] = 1.0
    live, count = torch.ones(1, 2, 100, dtype=torch.bool), torch.full((1, 2), 20)
    given = allocate_heads(weight[None], live, count, 0, 0, 0.0, 0.2)
    # the peaked head keeps its floor: a fifth of 20
    assert given.tolist() == [[36, 4]]
    assert allocate_heads(weight[None], live, count, 0, 0, 0.0, 1.0).tolist() == [[20, 20]]
    other = allocate_heads(weight[None].flip(1), live, count, 0, 0, 0.0, 0.2)
    assert other.tolist() == [[4, 36]]


def test_what_heads_get_is_the_best_of_all():
    """Without floor and protected rows, the kept rows are the globally best ones."""
    score, live = torch.randn(2, 3, 41), torch.ones(2, 3, 41, dtype=torch.bool)
    count = allocate_heads(score, live, torch.full((2, 3), 9), 0, 0, 0.0, 0.0)
    keep = select_top(score, live, count, 0, 0)
    for row in range(2):
        best = set(score[row].flatten().topk(27).indices.tolist())
        assert set(keep[row].flatten().nonzero().flatten().tolist()) == best


def chunks(score: list[list[float]], rows: list[int], count: int, chunk: int, recent: int):
    """The kept ones of `rows`: chunk by chunk, with Python's sort."""
    tail = min(recent + (len(rows) - recent) % chunk, len(rows))
    body, newest = rows[: len(rows) - tail], rows[len(rows) - tail :]
    parts = [body[i : i + chunk] for i in range(0, len(body), chunk)]
    order = sorted(parts, key=lambda part: (-sum(head[i] for head in score for i in part), part))
    kept = {i for part in order[: max(count - tail, 0) // chunk] for i in part}
    return kept | set(newest[max(tail - count, 0) :])


@pytest.mark.parametrize("ties", [False, True], ids=["scores", "ties"])
@pytest.mark.parametrize(("chunk", "recent"), [(1, 0), (1, 3), (4, 0), (5, 7), (10, 40)], ids=str)
def test_select_chunks(chunk, recent, ties):
    live = (torch.rand(4, 1, 37) < torch.tensor([0.0, 0.4, 0.8, 1.0])[:, None, None]).expand(
        -1, 2, -1
    )
    # sums of small integers are exact
    score = torch.randint(0, 2 if ties else 1000, live.shape).float()
    for wanted in (0, 1, 9, 20, 37, 50):
        count = torch.full((4, 2), wanted)
        keep = select_chunks(score.masked_fill(~live, float("nan")), live, count, chunk, recent)
        for row in range(4):
            index = live[row, 0].nonzero().flatten().tolist()
            expected = chunks(score[row].tolist(), index, wanted, chunk, recent)
            for head in range(2):
                assert set(keep[row, head].nonzero().flatten().tolist()) == expected
        assert bool((keep.sum(-1) <= wanted).all())
        if wanted >= 37:
            assert torch.equal(keep, live)


def test_chunks_of_one_row_are_the_best_rows_of_the_sum():
    score, live = torch.randn(2, 3, 41), torch.ones(2, 3, 41, dtype=torch.bool)
    count = torch.full((2, 3), 11)
    shared = score.mean(1, keepdim=True).expand_as(score)
    assert torch.equal(
        select_chunks(score, live, count, 1, 4), select_top(shared, live, count, 0, 4)
    )


def test_a_chunk_with_nan_is_the_worst():
    score, live = torch.ones(1, 1, 8), torch.ones(1, 1, 8, dtype=torch.bool)
    score[0, 0, 1] = float("nan")
    score[0, 0, 2:4] = -5.0
    keep = select_chunks(score, live, torch.tensor([[6]]), 2, 0)
    assert keep.tolist() == [[[False, False, True, True, True, True, True, True]]]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.55, 0.7])
def test_the_host_counts_alike(fraction):
    """Schedules count on the host what the op counts on the device."""
    tokens = torch.arange(1, 3000)
    wanted = [math.ceil(fraction * n) for n in tokens.tolist()]
    assert allocate_uniform(tokens, 1, fraction, 0, 1)[:, 0].tolist() == wanted


def test_a_short_head_leaves_its_share_to_the_others():
    """Heads that hold different numbers of entries: the sum over them is what counts."""
    live = torch.arange(40) < torch.tensor([[[5], [33], [20]]])
    count = torch.full((1, 3), 12)
    held_back = hold_back(live, count, 4)
    assert held_back.tolist() == [[12, 12, 12]]
    counts = allocate_heads(
        torch.rand(1, 3, 40), live, held_back, sinks=1, recent=2, share=0.0, floor=0.2
    )
    assert int(counts.sum()) == 36
    assert bool((counts <= live.sum(-1)).all())
    assert hold_back(live, torch.full((1, 3), 16), 4).tolist() == [[5, 33, 20]]
