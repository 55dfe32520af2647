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
