"""KNorm: long keys go first. See test_eviction.py."""

from __future__ import annotations

import torch

from kvfx.kernels.common.rotation import rotate
from kvfx.kernels.scores.reference import key_norm

LIVE = torch.ones(1, 1, 6, dtype=torch.bool)


def test_a_longer_key_ranks_lower():
    k = torch.randn(1, 1, 6, 8)
    longer = k.clone()
    longer[0, 0, 3] *= 2.0
    change = (key_norm(longer, LIVE) - key_norm(k, LIVE))[0, 0]
    assert change[3] < 0
    assert torch.equal(change[[0, 1, 2, 4, 5]], torch.zeros(5))


def test_rotation_does_not_matter():
    k = torch.randn(1, 1, 6, 8)
    turned = rotate(k, torch.arange(6).expand(1, 1, 6), torch.rand(4), "half")
    torch.testing.assert_close(key_norm(turned, LIVE), key_norm(k, LIVE))
