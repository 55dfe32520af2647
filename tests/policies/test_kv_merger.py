"""KVMerger: runs of similar keys become one entry. See test_matrix.py, kernels/test_merge.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import kvfx
from kvfx import KIVI, Full, KVMerger
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.policies.flat_dense import FlatDense
from kvfx.testing.tiny import left_padded, tiny_gpt2, tiny_llama


def compressed(policy, model=None):
    return kvfx.compress(model or tiny_llama(), policy, compile=False, verify=False)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mode": "both"}, "mode must be one of 'exact', 'threshold'"),
        ({"sigma": "mean"}, "sigma must be one of 'dist'"),
        ({"value_scale": "all"}, "value_scale must be one of 'none', 'paper', 'votes'"),
        ({"rotation": "never"}, "rotation must be one of 'after', 'before'"),
        ({"recent": 2.0}, "recent must be a number from 0 to 1"),
        ({"width": 0.0}, "width must be positive"),
        ({"linkage": "anchor"}, "needs mode='threshold'"),
        ({"budget": 64, "skip_layers": True}, "give the budget as a fraction"),
    ],
    ids=str,
)
def test_a_wrong_knob_is_named(knobs, message):
    with pytest.raises(PolicyError, match=message):
        KVMerger(**knobs)


def test_a_threshold_of_one_merges_nothing():
    """Strictly above: dense entries in a flat cache, which is as long as the prompt."""
    fast = compressed(KVMerger(mode="threshold", threshold=1.0, interval=8))
    past = fast(**left_padded((40, 23))).past_key_values
    assert isinstance(fast.plan.sites[0].store, FlatDense)
    for held in past.state.buffers:
        assert held["length"].tolist() == [[40, 40], [23, 23]]


def test_a_higher_threshold_never_leaves_fewer_entries():
    counts = []
    for threshold in (-1.0, 0.0, 0.5, 0.9):
        fast = compressed(KVMerger(mode="threshold", threshold=threshold, interval=8))
        held = fast(**left_padded((40, 23))).past_key_values.state.buffers
        counts.append(torch.stack([each["length"] for each in held]))
    for fewer, more in pairwise(counts):
        assert bool((fewer <= more).all())
    assert bool((counts[0] < counts[-1]).any())


def test_ragged_heads_give_their_memory_back():
    """The bytes are those of the entries that are there, with the room to go on."""
    policy = KVMerger(mode="threshold", threshold=0.0, interval=8)
    fast = compressed(policy)
    past = fast(**left_padded((200,))).past_key_values
    dense = compressed(Full())(**left_padded((200,))).past_key_values
    for held in past.state.buffers:
        mean = -(-int(held["length"].sum()) // 2)
        assert held["k_flat"].shape[1] == 2 * (mean + 8)
    assert past.nbytes() < 0.9 * dense.nbytes()


def test_votes_count_the_tokens_behind_each_entry():
    fast = compressed(KVMerger(budget=12, sinks=1, value_scale="votes", interval=4))
    past = fast.new_cache()
    fast(**left_padded((40, 23)), past_key_values=past)
    for step in range(11):
        expected = torch.tensor([40.0 + step, 23.0 + step])[:, None].expand(2, 2)
        for held in past.state.buffers:
            live = torch.arange(held["votes"].shape[2]) < held["length"][..., None]
            tokens = held["votes"].exp().masked_fill(~live, 0.0).sum(-1)
            torch.testing.assert_close(tokens, expected)
        fast(torch.full((2, 1), 5), past_key_values=past)


def test_attention_is_inherited():
    """Every row gave weight one to each of its two query heads, and nothing is ever lost."""
    fast = compressed(KVMerger(budget=12, sinks=1, interval=4))
    past = fast.new_cache()
    fast(**left_padded((40,)), past_key_values=past)
    for step in range(9):
        for held in past.state.buffers:
            total = held["score"].sum(-1)
            torch.testing.assert_close(total, torch.full_like(total, 2.0 * (40 + step)))
        fast(torch.full((1, 1), 5), past_key_values=past)


def test_layers_that_are_skipped_are_paid_by_the_others():
    policy = KVMerger(budget=0.6, skip_layers=True)
    plan = compressed(policy, tiny_llama(layers=8)).plan
    assert [site.select is None for site in plan.sites] == [True] * 2 + [False] * 5 + [True]
    budgets = [1.0 if site.select is None else site.select.budget for site in plan.sites]
    assert sum(budgets) / 8 == pytest.approx(0.6)
    with pytest.raises(PolicyError, match="3 of 8 layers kept whole are more than the budget"):
        compressed(KVMerger(budget=0.3, skip_layers=True), tiny_llama(layers=8))


def test_votes_count_over_codes_as_over_rows():
    model, logits = tiny_llama(head_dim=32), []
    for scale, store in (("votes", Full()), ("votes", KIVI(8, residual=0)), ("none", Full())):
        policy = KVMerger(budget=60, sinks=1, value_scale=scale, interval=4) | store
        fast = compressed(policy, model)
        past = fast.new_cache()
        fast(**left_padded((140, 90)), past_key_values=past)
        steps = [fast(torch.full((2, 1), 5), past_key_values=past).logits for _ in range(6)]
        logits.append(torch.cat(steps, 1))
    rows, codes, uncounted = logits
    assert (codes - rows).abs().max() < 0.1 * (uncounted - rows).abs().max()


def test_votes_need_attention_that_counts_them(monkeypatch):
    monkeypatch.setattr(KIVI, "biased", False)
    policy = KVMerger(value_scale="votes") | KIVI(8, residual=0)
    with pytest.raises(UnsupportedShape, match="votes are added to scores"):
        compressed(policy, tiny_llama(head_dim=32))


def test_merging_before_rotation_needs_a_rotation():
    with pytest.raises(UnsupportedShape, match="use rotation='after'"):
        compressed(KVMerger(rotation="before"), tiny_gpt2())


@pytest.mark.parametrize("sigma", ["dist", "fixed", "rms", "two_step", "literal"])
def test_every_kernel_runs(sigma):
    fast = compressed(KVMerger(budget=12, sinks=1, sigma=sigma, value_scale="paper", interval=4))
    assert fast.generate(**left_padded((40, 23)), max_new_tokens=12).shape == (2, 52)
