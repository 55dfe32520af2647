"""SnapKV: the end of the prompt chooses, its own tokens stay. See test_eviction.py."""

from __future__ import annotations

import torch

from kvfx.kernels.scores.reference import window
from kvfx.kernels.select.reference import select_top
from kvfx.policies import SnapKV


def test_the_window_stays_whatever_it_looks_at():
    policy = SnapKV(budget=6, window=4)
    score = torch.arange(20.0).flip(0).expand(1, 1, 20)
    keep = select_top(score, score > -1, torch.full((1, 1), 6), **policy.attributes())
    assert keep[0, 0].nonzero()[:, 0].tolist() == [0, 1, 16, 17, 18, 19]


def test_a_constant_added_to_a_row_of_logits_changes_nothing():
    k = torch.randn(1, 1, 9, 4)
    k[..., 0] = 1.0
    q = torch.randn(1, 2, 9, 4)
    live = torch.ones(1, 1, 9, dtype=torch.bool)
    shifted = q.clone()
    shifted[..., 0] += 3.0
    found, expected = (window(x, k, live, scale=1.0, window=3) for x in (shifted, q))
    torch.testing.assert_close(found, expected)


def test_short_prompts_are_kept_whole():
    policy = SnapKV(budget=0.25, window=32)
    assert policy.least() == 33
    assert [policy.kept(tokens) for tokens in (5, 33, 100, 200)] == [5, 33, 33, 50]
