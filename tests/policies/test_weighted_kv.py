"""WeightedKV: keys go, values move on. See test_matrix.py and kernels/test_merge.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import Full, WeightedKV
from kvfx.errors import PolicyError
from kvfx.testing.tiny import left_padded, tiny_llama


def test_values_are_means_weighted_by_average_attention():
    """Computed again from the dense cache and the model's own attention weights."""
    llama, policy = tiny_llama(), WeightedKV(budget=12, sinks=2, recent=3)
    prompt = left_padded((30,))
    fast, dense = (kvfx.compress(llama, p, compile=False, verify=False) for p in (policy, Full()))
    held = fast(**prompt).past_key_values.state.buffers
    every = dense(**prompt).past_key_values.state.buffers
    llama.set_attn_implementation("eager")
    weights = llama(**prompt, output_attentions=True, use_cache=False).attentions
    for found, whole, weight in zip(held, every, weights, strict=True):
        # two query heads per KV head; a token is seen by its own row and those after it
        seen = 30.0 - torch.arange(30)
        average = weight[0].unflatten(0, (2, 2)).sum((1, 2)) / seen
        for head in range(2):
            free = sorted(range(2, 27), key=lambda at: -float(average[head, at]))[:7]
            kept = sorted([0, 1, *free, 27, 28, 29])
            k, v = whole["k_cache"][0, head], whole["v_cache"][0, head]
            assert torch.equal(found["k_cache"][0, head, :12], k[kept])
            before = -1
            for index, at in enumerate(kept):
                run = slice(before + 1, at + 1)
                mean = average[head, run] @ v[run] / average[head, run].sum()
                torch.testing.assert_close(found["v_cache"][0, head, index], mean)
                before = at


@pytest.mark.parametrize("knobs", [{"sinks": -1}, {"recent": 0}, {"interval": 0}], ids=str)
def test_a_wrong_knob_is_named(knobs):
    (name, _), *_ = knobs.items()
    with pytest.raises(PolicyError, match=f"{name} must be an integer of at least"):
        WeightedKV(**knobs)
