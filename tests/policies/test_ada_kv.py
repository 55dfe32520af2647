"""AdaKV: heads that spread their attention keep more, and memory is the sum. See test_matrix.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import H2O, KIVI, AdaKV, Full, SnapKV, StreamingLLM
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.policies.flat_dense import FlatDense
from kvfx.testing.tiny import left_padded, tiny_llama

SNAPKV = SnapKV(budget=16, window=4, interval=4)


@pytest.mark.parametrize("floor", [-0.1, 1.1, True], ids=str)
def test_the_floor_is_a_share(floor):
    with pytest.raises(PolicyError, match="floor must be a number from 0 to 1"):
        AdaKV(floor=floor)


def test_a_floor_of_one_divides_evenly():
    llama = tiny_llama(kv_heads=4)
    even = kvfx.compress(llama, SNAPKV | AdaKV(floor=1.0), compile=False, verify=False)
    adapted = kvfx.compress(llama, SNAPKV | AdaKV(floor=0.0), compile=False, verify=False)
    prompt = left_padded((50, 30))
    lengths = [
        torch.stack([held["length"] for held in fast(**prompt).past_key_values.state.buffers])
        for fast in (even, adapted)
    ]
    assert bool((lengths[0] == 16).all())
    assert bool((lengths[1] != 16).any())
    assert bool((lengths[1].sum(-1) == 4 * 16).all())


def test_memory_is_the_sum_over_heads():
    """The same bytes as an even division, but for where heads start."""
    llama = tiny_llama(kv_heads=4)
    prompt, held = left_padded((50, 30)), []
    for policy in (SNAPKV, SNAPKV | AdaKV()):
        fast = kvfx.compress(llama, policy, compile=False, verify=False)
        past = fast(**prompt).past_key_values
        assert past.nbytes() == fast.memory(2, 50)
        held.append(past.nbytes())
    starts = 2 * 2 * 4 * torch.int32.itemsize
    assert held[1] == held[0] + starts


def test_the_flat_cache_stands_in_for_the_dense_one():
    plan = kvfx.compress(tiny_llama(), SNAPKV | AdaKV(), compile=False, verify=False).plan
    assert {type(site.store) for site in plan.sites} == {FlatDense}
    assert plan.sites[0].methods == "SnapKV | AdaKV | FlatDense"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (SNAPKV | AdaKV() | KIVI(8, residual=0), "different numbers of tokens need a dense cache"),
        (StreamingLLM() | AdaKV(), "StreamingLLM ranks no tokens"),
    ],
    ids=["quantized", "unranked"],
)
def test_what_does_not_go_together_is_refused(policy, reason):
    with pytest.raises(UnsupportedShape, match=reason):
        kvfx.compress(tiny_llama(head_dim=32), policy, compile=False, verify=False)


def test_it_needs_a_method_that_selects():
    with pytest.raises(PolicyError, match=r"AdaKV\(floor=0.2\) needs a policy that selects"):
        kvfx.compress(tiny_llama(), AdaKV() | Full(), compile=False, verify=False)


def test_a_long_turn_is_laid_out_anew():
    """A turn longer than the room behind the heads, and the evictions after it."""
    fast = kvfx.compress(tiny_llama(), H2O(16, interval=4) | AdaKV(), compile=False, verify=False)
    past = fast.new_cache()
    for rows in (40, 1, 25, 1, 1, 1, 1, 7):
        logits = fast(left_padded((rows,), seed=rows)["input_ids"], past_key_values=past).logits
        assert bool(logits.isfinite().all())
        for held in past.state.buffers:
            assert (
                int(held["length"].sum()) == 2 * past.state.entries[fast.plan.sites[0].schedule][0]
            )
            ends = held["start"] + held["length"]
            assert bool((ends[:, :-1] <= held["start"][:, 1:]).all())
            assert bool((ends[:, -1] <= held["k_flat"].shape[1]).all())
