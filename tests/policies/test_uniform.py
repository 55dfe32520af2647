"""Uniform: equal budgets, as a method's own budget. See test_layer_budgets.py."""

from __future__ import annotations

import torch

import kvfx
from kvfx import H2O, Uniform
from kvfx.testing.tiny import left_padded, tiny_llama


def test_it_is_the_methods_own_budget():
    caches = []
    for policy in (H2O(16, interval=8), Uniform(16) | H2O(interval=8)):
        fast = kvfx.compress(tiny_llama(), policy, compile=False, verify=False)
        caches.append(fast(**left_padded((60, 30))).past_key_values.state.buffers)
    for one, other in zip(*caches, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name])
