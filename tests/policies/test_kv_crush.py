"""KVCrush: as many entries, some of them representatives. See also test_matrix.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import H2O, KVCrush, SnapKV, StreamingLLM
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.testing.tiny import left_padded, tiny_llama

SNAPKV = SnapKV(budget=16, window=4, pool=1, interval=4)


def cache(policy, lengths=(60, 33)):
    fast = kvfx.compress(tiny_llama(), policy, compile=False, verify=False)
    return fast(**left_padded(lengths), logits_to_keep=1).past_key_values.state.buffers


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": 1.5}, "ratio must be a number from 0 to 1"),
        ({"anchor": "median"}, "anchor must be one of 'mean', 'random'"),
        ({"bits": "all"}, "bits must be one of 'half', 'keepset'"),
        ({"pick": "first"}, "pick must be one of 'linspace', 'stride'"),
        ({"page": 0}, "page must be an integer of at least 1"),
        ({"budget": 0}, "a count of entries must be at least 1"),
    ],
    ids=str,
)
def test_a_wrong_knob_is_named(knobs, message):
    with pytest.raises(PolicyError, match=message):
        KVCrush(**knobs)


def test_alone_it_refines_heavy_hitters():
    alone = cache(KVCrush(budget=16))
    refined = cache(H2O(budget=16) | KVCrush())
    for one, other in zip(alone, refined, strict=True):
        assert torch.equal(one["k_cache"], other["k_cache"])


def test_without_representatives_it_is_its_base():
    """Property 2 of the specification: the same entries, bit by bit."""
    for one, other in zip(cache(SNAPKV), cache(SNAPKV | KVCrush(ratio=0.0)), strict=True):
        for name in ("k_cache", "v_cache", "length"):
            assert torch.equal(one[name], other[name])


@pytest.mark.parametrize("anchor", ["mean", "random", "alternating", "zeros", "ones"])
@pytest.mark.parametrize(
    "knobs", [{}, {"bits": "keepset"}, {"pick": "stride"}, {"page": 4}], ids=str
)
def test_every_rule_keeps_as_many(anchor, knobs):
    base, refined = cache(SNAPKV), cache(SNAPKV | KVCrush(ratio=0.5, anchor=anchor, **knobs))
    for one, other in zip(base, refined, strict=True):
        assert torch.equal(one["length"], other["length"])
        assert not torch.equal(one["k_cache"], other["k_cache"])
        # the window stays where it was
        assert torch.equal(one["k_cache"][:, :, 12:16], other["k_cache"][:, :, 12:16])


def test_positions_are_known_after_evictions():
    """Heads keep different tokens: their positions are those of the tokens, in order."""
    fast = kvfx.compress(tiny_llama(), SNAPKV | KVCrush(), compile=False, verify=False)
    past = fast.new_cache()
    fast(**left_padded((60, 33)), past_key_values=past)
    for _ in range(9):
        fast(torch.full((2, 1), 5), past_key_values=past)
    for held in past.state.buffers:
        for row, last in ((0, 68), (1, 41)):
            for head in range(2):
                count = int(held["length"][row, head])
                place = held["position"][row, head, :count].tolist()
                assert place == sorted(set(place))
                assert place[-1] == last


def test_a_base_that_ranks_nothing_is_refused():
    with pytest.raises(UnsupportedShape, match="StreamingLLM ranks no tokens"):
        kvfx.compress(tiny_llama(), StreamingLLM() | KVCrush(), compile=False, verify=False)
