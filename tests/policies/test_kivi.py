"""KIVI as data: its knobs, its buffers' bytes, its schedule, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from kvfx.errors import PolicyError
from kvfx.geometry import Causal, Site
from kvfx.policies.kivi import KIVI


def site(head_dim: int = 64, value_dim: int = 64) -> Site:
    """A site of nine query heads."""
    device = torch.device("cpu")
    return Site(0, "s", 9, 3, head_dim, value_dim, 0.125, Causal(), None, torch.float32, device)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 3}, r"KIVI\(bits=3\): bits must be one of 2, 4, 8"),
        ({"k_bits": 16}, r"KIVI\(k_bits=16\)"),
        ({"v_bits": 1}, r"KIVI\(v_bits=1\)"),
        ({"mode": "block"}, r"mode must be one of 'kivi', 'window'"),
        ({"group_size": 16}, "group_size must be an integer of at least 32"),
        ({"group_size": 48, "residual": 96}, "group_size must be a multiple of 32"),
        ({"residual": 100}, "residual must be a multiple of 32"),
        ({"residual": 0, "mode": "kivi"}, "residual must be an integer of at least 32"),
        ({"residual": -32}, "residual must be an integer of at least 0"),
    ],
)
def test_a_wrong_knob_is_named(knobs, message):
    with pytest.raises(PolicyError, match=message):
        KIVI(**knobs)


@pytest.mark.parametrize("policy", [KIVI(), KIVI(4, mode="kivi"), KIVI(k_bits=8, v_bits=4)])
def test_repr_is_python(policy):
    assert eval(repr(policy)) == policy


def test_bits_of_keys_and_values_default_to_bits():
    assert (KIVI(4).key_bits, KIVI(4).value_bits) == (4, 4)
    assert (KIVI(4, k_bits=8).key_bits, KIVI(4, k_bits=8).value_bits) == (8, 4)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(40, 64), (64, 48)])
def test_rows_that_groups_do_not_fill_are_refused(head_dim, value_dim):
    name, size = ("head_dim", 40) if head_dim == 40 else ("value_dim", 48)
    reason = KIVI().constraint(site(head_dim, value_dim))
    assert reason == f"{name} {size} is not a multiple of group_size 32"
    assert KIVI().constraint(site(96, 64)) is None


@pytest.mark.parametrize("mode", ["kivi", "window"])
def test_two_bits_need_less_than_15_percent(mode):
    policy = KIVI(2, mode=mode)
    capacity = policy.capacity(4096, bounded=False)
    buffers = policy.buffers(site()).values()
    stored = sum(math.prod(b.sizes(1, capacity)) * b.dtype.itemsize for b in buffers)
    assert stored <= 0.15 * 3 * 4096 * 2 * 64 * 4


@pytest.mark.parametrize("mode", ["kivi", "window"])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_capacity_holds_what_is_quantized_until_the_next_flush(mode, bounded, group_size):
    policy = KIVI(mode=mode, group_size=group_size, residual=2 * group_size)
    previous = 0
    for entries in range(1, 1200):
        capacity = policy.capacity(entries, bounded=bounded)
        quantized = policy.residual * (entries // policy.residual)
        if mode == "window":
            quantized = max(0, entries - policy.residual) // group_size * group_size
        assert capacity >= max(quantized, previous)
        assert capacity % group_size == 0
        assert bounded or capacity % 256 == 0
        previous = capacity


def test_flush_is_due_when_a_ring_is_full():
    published = KIVI(mode="kivi", residual=64)
    assert [n for n in range(260) if published.flush_due(n)] == [64, 128, 192, 256]
    window = KIVI(mode="window", residual=64)
    assert [n for n in range(200) if window.flush_due(n)] == [96, 128, 160, 192]
