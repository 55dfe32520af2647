"""D2O: heavy hitters that take in what is like them. See test_matrix.py, kernels/test_merge.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import D2O, H2O
from kvfx.errors import PolicyError
from kvfx.testing.tiny import left_padded, tiny_llama


def compressed(policy, layers=2):
    return kvfx.compress(tiny_llama(layers=layers), policy, compile=False, verify=False)


def test_the_outer_layers_are_left_alone():
    plan = compressed(D2O(), layers=6).plan
    assert [site.select is None for site in plan.sites] == [True, True, False, False, False, True]


def test_the_gate_moves_with_every_eviction():
    fast = compressed(D2O(budget=16, skip_layers=False, interval=4))
    past = fast.new_cache()
    fast(**left_padded((12, 9)), past_key_values=past)
    assert bool(past.state.buffers[0]["gate"].isnan().all())
    fast(**left_padded((30, 30)), past_key_values=past)
    first = past.state.buffers[0]["gate"].clone()
    assert bool(first.isfinite().all())
    for _ in range(4):
        fast(torch.full((2, 1), 5), past_key_values=past)
    assert not torch.equal(past.state.buffers[0]["gate"], first)


def test_what_stays_is_what_h2o_keeps():
    """The same tokens with the same attention; keys took in others."""
    hitters = H2O(budget=16, interval=4)
    merged, alone = compressed(D2O(16, sinks=0, skip_layers=False, interval=4)), compressed(hitters)
    found = merged(**left_padded((50, 30))).past_key_values.state.buffers
    expected = alone(**left_padded((50, 30))).past_key_values.state.buffers
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["length"], other["length"])
        torch.testing.assert_close(one["score"], other["score"])
        assert not torch.equal(one["k_cache"], other["k_cache"])


@pytest.mark.parametrize("knobs", [{"past": 2.0}, {"recent": -0.1}, {"sinks": -1}], ids=str)
def test_a_wrong_knob_is_named(knobs):
    (name, _), *_ = knobs.items()
    with pytest.raises(PolicyError, match=f"{name} must be"):
        D2O(**knobs)
