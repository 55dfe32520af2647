"""WindowRing as data: never more entries than the window."""

from __future__ import annotations

import pytest
import torch

from kvfx.errors import PolicyError
from kvfx.geometry import Site, Window
from kvfx.policies.window_ring import WindowRing

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [0, -3, True, 2.5])
def test_a_wrong_window_is_named(window):
    message = rf"WindowRing\(window={window!r}\): window must be an integer of at least 1"
    with pytest.raises(PolicyError, match=message):
        WindowRing(window)


def test_buffers():
    site = Site(0, "s", 8, 2, 16, 12, 0.25, Window(9), None, torch.float32, CPU)
    buffers = WindowRing(9).buffers(site)
    sizes = {name: buffer.sizes(3, 9) for name, buffer in buffers.items()}
    assert sizes == {
        "k_cache": (3, 2, 9, 16),
        "v_cache": (3, 2, 9, 12),
        "position": (3, 9),
        "length": (3, 1),
    }
    assert buffers["position"].allocate(1, 4, CPU).tolist() == [[-1] * 4]
    assert WindowRing(9).attributes(site) == {"window": 9}


@pytest.mark.parametrize("window", [1, 100, 256, 300, 1000])
@pytest.mark.parametrize("bounded", [True, False])
def test_capacity_is_the_window_or_less(window, bounded):
    policy = WindowRing(window)
    for entries in range(1, 1300, 7):
        capacity = policy.capacity(entries, bounded=bounded)
        assert min(entries, window) <= capacity <= window


def test_facts():
    policy = WindowRing(16)
    assert eval(repr(policy)) == policy
    assert (policy.room, policy.rows, policy.croppable) == ("ring", "positions", False)
