"""The entries room: numbers stay with the entries that they belong to."""

from __future__ import annotations

import pytest
import torch

from kvfx.kernels.dense import reference as dense
from kvfx.kernels.entries import reference as entries

CAPACITY = 23


def empty() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Dense buffers of one channel without entries, and their numbers."""
    cache = [torch.full((2, 3, CAPACITY, 1), float("nan")) for _ in range(2)]
    return [*cache, torch.zeros(2, 3, dtype=torch.int32)], torch.zeros(2, 3, CAPACITY)


def store(x: torch.Tensor, keep: torch.Tensor, cache, numbers) -> None:
    """Rows whose key is their number."""
    entries.store(x, keep, cache[2], numbers)
    dense.store(x[..., None], x[..., None], keep, *cache)


def assert_together(cache, numbers) -> None:
    live = torch.arange(CAPACITY) < cache[2][..., None]
    assert torch.equal(numbers[live], cache[0][..., 0][live])
    assert bool((numbers[~live] == 0).all())


def test_numbers_follow_their_rows():
    cache, numbers = empty()
    for rows in (7, 1, 9):
        store(torch.rand(2, 3, rows), torch.rand(2, 3, rows) < 0.6, cache, numbers)
        assert_together(cache, numbers)
    live = torch.arange(CAPACITY) < cache[2][..., None]
    keep = live & (torch.rand(2, 3, CAPACITY) < 0.5)
    entries.compact(keep, numbers)
    k, v, _ = dense.load(*cache)
    cache[2].zero_()
    dense.store(k, v, keep, *cache)
    assert_together(cache, numbers)


def test_a_turn_adds_to_old_entries_and_brings_its_own():
    cache, numbers = empty()
    store(torch.rand(2, 3, 5), torch.rand(2, 3, 5) < 0.7, cache, numbers)
    before, length = numbers.clone(), cache[2].clone()
    x, keep = torch.rand(2, 3, CAPACITY + 4), torch.rand(2, 3, 4) < 0.7
    entries.extend(x, keep, length, numbers)
    for row in range(2):
        for head in range(3):
            old = int(length[row, head])
            expected = [
                *(before[row, head, :old] + x[row, head, :old]).tolist(),
                *x[row, head, CAPACITY:][keep[row, head]].tolist(),
            ]
            assert numbers[row, head].tolist() == pytest.approx(
                expected + [0.0] * (CAPACITY - len(expected))
            )


def test_one_row_is_appended():
    """Numbers follow a row of a step as they follow those of a prompt; what is not kept is NaN."""
    cache, numbers = empty()
    store(torch.rand(2, 3, 5), torch.rand(2, 3, 5) < 0.7, cache, numbers)
    for _ in range(9):
        keep = torch.rand(2, 3, 1) < 0.6
        x = torch.rand(2, 3, 1).masked_fill(~keep, float("nan"))
        entries.append(x, keep, cache[2], numbers)
        dense.append(x[..., None], x[..., None], keep, *cache)
        assert_together(cache, numbers)


def test_positions_are_numbers_too():
    """Integers beyond what fp32 can tell apart stay as they are, from rows of another dtype."""
    first, length = 2**24 + 1, torch.tensor([[0, 2]], dtype=torch.int32)
    numbers = torch.zeros(1, 2, 7, dtype=torch.int32)
    numbers[0, 1, :2] = torch.tensor([5, 6])
    rows = torch.arange(first, first + 3).expand(1, 2, -1)
    keep = torch.tensor([[[True, False, True], [True, True, True]]])
    entries.store(rows, keep, length, numbers)
    length += torch.tensor([[2, 3]])
    entries.append(rows[..., :1] + 9, torch.tensor([[[True], [False]]]), length, numbers)
    length += torch.tensor([[1, 0]])
    held = [[first, first + 2, first + 9], [5, 6, first, first + 1, first + 2]]
    assert numbers.tolist() == [[row + [0] * (7 - len(row)) for row in held]]
    keep = torch.arange(7) < length[..., None]
    keep[..., 0] = False
    entries.compact(keep, numbers)
    assert numbers.tolist() == [[row[1:] + [0] * (8 - len(row)) for row in held]]
    more = torch.ones(1, 2, 8, dtype=torch.int32)
    entries.extend(more, torch.zeros(1, 2, 1, dtype=torch.bool), length - 1, numbers)
    assert numbers.tolist() == [[[x + 1 for x in row[1:]] + [0] * (8 - len(row)) for row in held]]
    assert numbers.dtype == torch.int32


def test_heads_share_their_mean():
    score = torch.rand(2, 3, 5)
    assert torch.allclose(entries.share_heads(score)[:, 2], score.mean(1))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_smooth(mode):
    score = torch.rand(1, 2, 9)
    found = entries.smooth(score, 3, mode)
    for at in range(9):
        window = score[..., max(at - 1, 0) : at + 2]
        expected = window.sum(-1) / 3 if mode == "mean" else window.amax(-1)
        torch.testing.assert_close(found[..., at], expected)
    assert torch.equal(entries.smooth(score, 1, mode), score)
