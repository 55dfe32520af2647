"""CaM: keys of the base method, values with what was evicted. See test_matrix.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import H2O, CaM, KeyDiff, StreamingLLM
from kvfx.errors import PolicyError
from kvfx.testing.tiny import left_padded, tiny_llama


def cache(policy):
    fast = kvfx.compress(tiny_llama(), policy, compile=False, verify=False)
    return fast(**left_padded((50, 30)), logits_to_keep=1).past_key_values.state.buffers


@pytest.mark.parametrize(
    "base", [H2O(16), StreamingLLM(budget=16), KeyDiff(16)], ids=["h2o", "streaming", "keydiff"]
)
def test_keys_are_those_of_the_base_and_values_are_not(base):
    for alone, merged in zip(cache(base), cache(base | CaM(targets=4)), strict=True):
        assert torch.equal(alone["length"], merged["length"])
        torch.testing.assert_close(alone["k_cache"][:, :, :16], merged["k_cache"][:, :, :16])
        assert not torch.equal(alone["v_cache"][:, :, :16], merged["v_cache"][:, :, :16])


def test_each_layer_draws_its_own_lots():
    plan = kvfx.compress(tiny_llama(), H2O() | CaM(seed=3), compile=False, verify=False).plan
    seeds = {CaM(seed=3).merge_attributes(site.site)["seed"] for site in plan.sites}
    assert len(seeds) == 2


@pytest.mark.parametrize("knobs", [{"targets": 0}, {"seed": -1}], ids=str)
def test_a_wrong_knob_is_named(knobs):
    with pytest.raises(PolicyError, match="must be an integer of at least"):
        CaM(**knobs)


def test_it_needs_a_method_that_evicts():
    with pytest.raises(PolicyError, match=r"needs a policy that selects: H2O\(\) \| CaM"):
        kvfx.compress(tiny_llama(), CaM(), compile=False, verify=False)
