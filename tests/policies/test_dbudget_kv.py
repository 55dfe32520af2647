"""DBudgetKV: the last row decides how far back. See also kernels/test_budgets.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import DBudgetKV, Full
from kvfx.errors import PolicyError
from kvfx.testing.tiny import left_padded


def compressed(model, policy):
    return kvfx.compress(model, policy, compile=False, verify=False)


def test_the_first_layers_stay_whole_and_others_keep_both_ends(small):
    fast = compressed(small, DBudgetKV(0.05, interval=8))
    past = fast(**left_padded((90, 40))).past_key_values
    every = compressed(small, Full())(**left_padded((90, 40))).past_key_values.state.buffers
    assert [site.select is None for site in fast.plan.sites] == [True, True, False, False, False]
    assert past.state.buffers[0]["length"].tolist() == [[90, 90], [40, 40]]
    shorter = 0
    for buffers, whole in zip(past.state.buffers[2:], every[2:], strict=True):
        for row, tokens in enumerate((90, 40)):
            for head in range(2):
                first, count = int(buffers["start"][row, head]), int(buffers["length"][row, head])
                kept = [*range(4), *range(tokens - count + 4, tokens)]
                expected = whole["k_cache"][row, head, kept]
                assert torch.equal(buffers["k_flat"][row, first : first + count], expected)
                shorter += count < tokens
    assert shorter > 0


def test_replies_go_on(small):
    fast = compressed(small, DBudgetKV(0.05, skip_layers=False, interval=8))
    assert fast.generate(**left_padded((90, 40)), max_new_tokens=30).shape == (2, 120)


def test_the_threshold_is_a_part():
    with pytest.raises(PolicyError, match="between 0 and 1"):
        DBudgetKV(1.0)
