"""The reuse room: rows at any positions, against the whole matrix of weights, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.prompt import reference as prompt
from kvfx.kernels.reuse import reference
from kvfx.kernels.scores.reference import columns

SCALE = 0.3
# kv_heads, repeat, live rows, head_dim, value_dim
SHAPES = [(1, 1, 1, 8, 8), (2, 3, 63, 12, 20), (1, 4, 100, 16, 16)]


def live(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q for every row, keys and values."""
    kv_heads, repeat, rows, width, value = shape
    q = torch.randn(2, kv_heads * repeat, rows, width, dtype=dtype)
    k = torch.randn(2, kv_heads, rows, width, dtype=dtype)
    return q, k, torch.randn(2, kv_heads, rows, value, dtype=dtype)


def weights(q: Tensor, k: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """The whole matrix [B, H, S, N] of weights, by the definition."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    index = torch.arange(k.shape[2])
    distance = positions[:, None, :, None] - index
    seen = (distance >= 0) & (distance < (window or 10**9))
    score = (q @ k.mT * SCALE).masked_fill(~seen, float("-inf"))
    return score.softmax(-1).nan_to_num(0.0)


def scattered(rows: int) -> Tensor:
    """Some positions in no order, two of them padding: [2, S]."""
    order = torch.stack([torch.randperm(rows) for _ in range(2)])[:, : max(rows // 2, 1)]
    return torch.cat((order, torch.full((2, 2), -1)), 1)


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_sees_rows_up_to_its_own_position(shape, window):
    q, k, v = live(shape)
    positions = scattered(shape[2])
    asked = reference.take_rows(q, positions, axis=2)
    out = reference.attend_rows(asked, positions, k, v, scale=SCALE, window=window)
    weight = weights(asked, k, positions, window)
    expected = weight @ v.repeat_interleave(shape[1], 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert bool((out[:, :, -2:] == 0).all())


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", [1, 63, 600])
def test_attend_of_a_whole_prompt_is_that_of_the_prompt_room(rows, window):
    q, k, v = live((2, 2, rows, 8, 8), torch.float32)
    positions = torch.arange(rows).expand(2, rows)
    out = reference.attend_rows(q, positions, k, v, scale=SCALE, window=window)
    expected = prompt.attend(q, k, v, positions, scale=SCALE, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert out.stride() == expected.stride()


def test_attend_of_padding_alone_is_zero():
    q, k, v = live((2, 2, 3, 8, 8))
    nowhere = torch.full((2, 3), -1)
    for window in (None, 2):
        out = reference.attend_rows(q, nowhere, k, v, scale=SCALE, window=window)
        assert bool((out == 0).all())
        received = reference.column_attention(q, k, nowhere, scale=SCALE, window=window)
        assert bool((received == 0).all())


def test_what_lies_behind_a_row_is_not_seen():
    q, k, v = live((1, 2, 64, 8, 8))
    positions = torch.tensor([[40, 3], [7, 20]])
    asked = q[:, :, :2]
    before = reference.attend_rows(asked, positions, k, v, scale=SCALE)
    weight = reference.column_attention(asked, k, positions, scale=SCALE)
    for x in (k, v):
        x[0, :, 41:], x[1, :, 21:] = 9.0, -9.0
    assert torch.equal(reference.attend_rows(asked, positions, k, v, scale=SCALE), before)
    after = reference.column_attention(asked, k, positions, scale=SCALE)
    assert torch.equal(after, weight)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_attention(shape, window):
    q, k, _ = live(shape)
    positions = scattered(shape[2])
    asked = reference.take_rows(q, positions, axis=2)
    found = reference.column_attention(asked, k, positions, scale=SCALE, window=window)
    weight = weights(asked, k, positions, window)
    expected = weight.sum(2).unflatten(1, (shape[0], shape[1])).sum(2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    given = (positions >= 0).sum(1)[:, None].expand(-1, shape[0]) * shape[1]
    torch.testing.assert_close(found.sum(-1), given.float(), rtol=1e-5, atol=1e-5)


def test_column_attention_of_a_whole_prompt_is_that_of_the_scores_room():
    q, k, _ = live((2, 3, 300, 8, 8), torch.float32)
    positions = torch.arange(300).expand(2, 300)
    expected = columns(q, k, torch.ones(k.shape[:3], dtype=torch.bool), scale=SCALE)
    found = reference.column_attention(q, k, positions, scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_scatter_writes_at_positions_and_drops_padding():
    _, k, v = live((2, 1, 9, 4, 6))
    k_rows, v_rows = torch.zeros(2, 2, 20, 4).double(), torch.zeros(2, 2, 20, 6).double()
    positions = torch.tensor([[19, 0, -1, 3, 4, 5, 6, 7, 8], [-1, -1, 2, 1, 0, 11, 12, 13, 14]])
    reference.scatter_rows(k, v, positions, k_rows, v_rows)
    expected = torch.zeros_like(k_rows), torch.zeros_like(v_rows)
    for batch in range(2):
        for row, position in enumerate(positions[batch].tolist()):
            if position >= 0:
                expected[0][batch, :, position] = k[batch, :, row]
                expected[1][batch, :, position] = v[batch, :, row]
    assert torch.equal(k_rows, expected[0])
    assert torch.equal(v_rows, expected[1])
    reference.scatter_rows(k, v, positions, k_rows, v_rows)
    assert torch.equal(k_rows, expected[0])


def test_deviation():
    _, new, old = live((2, 1, 9, 4, 4))
    positions = torch.tensor([[3, -1, 8], [0, 1, 2]])
    there = torch.stack([old[0, :, [3, 0, 8]], old[1, :, [0, 1, 2]]])
    difference = (new[:, :, :3] - there).float()
    difference[0, :, 1] = 0.0
    for norm, expected in (("l1", difference.abs().sum(-1)), ("l2", difference.square().sum(-1))):
        found = reference.row_deviation(new[:, :, :3], old, positions, norm=norm)
        torch.testing.assert_close(found, expected)
    same = reference.row_deviation(old, old, torch.arange(9).expand(2, 9), norm="l1")
    assert bool((same == 0).all())


def test_deviation_refuses_other_norms():
    _, new, old = live((1, 1, 3, 4, 4))
    with pytest.raises(UnsupportedShape, match="norm='max': choose one of l1, l2"):
        reference.row_deviation(new, old, torch.arange(3).expand(2, 3), norm="max")


def plain_choice(
    score: list[float], must: list[bool], may: list[bool], count: int
) -> list[int]:  # fmt: skip
    """What `choose_rows` promises, for one request."""
    forced = [row for row, wanted in enumerate(must) if wanted]
    free = [row for row, wanted in enumerate(may) if wanted and not must[row]]
    free.sort(key=lambda row: (-score[row], row))
    chosen = sorted(forced + free[: count - len(forced)])
    return chosen + [-1] * (count - len(chosen))


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 5),
)
def test_choice(rows, extra):
    score, must, may = (list(column) for column in zip(*rows, strict=True))
    count = sum(must) + extra
    found = reference.choose_rows(
        torch.tensor([score]), torch.tensor([must]), torch.tensor([may]), torch.empty(count)
    )
    assert found.tolist() == [plain_choice(score, must, may, count)]


def test_a_score_that_is_no_number_is_chosen_first():
    score = torch.tensor([[1.0, float("nan"), 3.0]])
    every = torch.ones(1, 3, dtype=torch.bool)
    found = reference.choose_rows(score, ~every, every, torch.empty(1))
    assert found.tolist() == [[1]]


def test_changing_a_row_that_is_not_chosen_changes_nothing():
    """KS-4: the best scores are kept, and what the others would have scored is not looked at."""
    generator = torch.Generator().manual_seed(4)
    score = torch.rand(1, 50, generator=generator)
    must = torch.zeros(1, 50, dtype=torch.bool)
    chosen = reference.choose_rows(score, must, ~must, torch.empty(10))
    dropped = torch.ones(50, dtype=torch.bool).index_fill(0, chosen[0], value=False)
    assert score[0, chosen[0]].min() >= score[0, dropped].max()
    score[0, dropped] *= 0.5
    assert torch.equal(reference.choose_rows(score, must, ~must, torch.empty(10)), chosen)


def test_take_rows_and_positions():
    x = torch.randn(2, 3, 5, 4)
    rows = torch.tensor([[4, 1, -1], [0, 2, 3]])
    taken = reference.take_rows(x, rows, axis=2)
    for batch in range(2):
        for place, row in enumerate(rows[batch].tolist()):
            assert torch.equal(taken[batch, :, place], x[batch, :, max(row, 0)])
    positions = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, -1]])
    assert reference.take_positions(positions, rows).tolist() == [[9, 6, -1], [1, 3, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_score_bounds_the_error_of_the_output(seed):
    """KS-9: with perturbed values, `sum_i |do_i|_1 <= sum_j alpha_j |dv_j|_1`, with equality where
    one row alone is perturbed.
    """
    torch.manual_seed(seed)
    rows = 41
    q, k, v = live((2, 3, rows, 8, 8))
    positions = torch.arange(rows).expand(2, rows)
    old = v + torch.randn_like(v) * torch.rand(2, 2, rows, 1)
    received = reference.column_attention(q, k, positions, scale=SCALE)

    def error_and_bound(old: Tensor) -> tuple[Tensor, Tensor]:
        out, other = (
            reference.attend_rows(q, positions, k, x, scale=SCALE) for x in (v, old)
        )  # fmt: skip
        deviation = reference.row_deviation(v, old, positions, norm="l1")
        bound = reference.weigh_rows(deviation, received, positions)
        return (out - other).abs().sum((1, 2, 3)), bound.sum(1).double()

    error, bound = error_and_bound(old)
    assert bool((error <= bound).all())
    # rows cancel each other somewhere
    assert bool((error < 0.99 * bound).all())
    alone = v.clone()
    alone[:, :, 7] = old[:, :, 7]
    error, bound = error_and_bound(alone)
    torch.testing.assert_close(error, bound, rtol=1e-5, atol=1e-6)
