"""KeyDiff: keys that look like the others go first. See test_eviction.py."""

from __future__ import annotations

import torch

from kvfx.kernels.scores.reference import key_difference

LIVE = torch.ones(1, 1, 6, dtype=torch.bool)


def test_one_direction_goes_before_another():
    k = torch.zeros(1, 1, 6, 3)
    k[..., 0] = 1.0
    k[0, 0, 4] = torch.tensor([0.0, 1.0, 0.0])
    score = key_difference(k, LIVE)[0, 0]
    assert int(score.argmax()) == 4
    assert torch.allclose(score[:4], score[0])


def test_lengths_do_not_matter():
    k = torch.randn(1, 1, 6, 8)
    longer = k * torch.rand(1, 1, 6, 1).add(0.1)
    torch.testing.assert_close(key_difference(longer, LIVE), key_difference(k, LIVE))


def test_dead_rows_do_not_turn_the_mean():
    k = torch.randn(1, 1, 6, 8)
    live = LIVE.clone()
    live[0, 0, :2] = False
    dirty = k.clone()
    dirty[0, 0, :2] = float("nan")
    found = key_difference(dirty, live)[..., 2:]
    torch.testing.assert_close(found, key_difference(k[:, :, 2:], live[..., 2:]))
