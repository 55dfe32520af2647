"""PrefixKV: one part of its attention for every layer. See also core/test_budgets.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvfx
from kvfx import KIVI, Full, KeyDiff, PrefixKV, SnapKV
from kvfx.budgets.prefix import prefix_counts
from kvfx.errors import PolicyError
from kvfx.policies.prefix_kv import PrefixTokens
from kvfx.testing.tiny import left_padded

ONLINE = PrefixKV(0.25, online=True)


def compressed(model, policy, calibration=None):
    return kvfx.compress(model, policy, calibration=calibration, compile=False, verify=False)


def test_alone_it_keeps_what_was_published(small, calibration):
    """The first token, the newest, and the best by the attention of all rows and heads."""
    plan = compressed(small, PrefixKV(0.25), calibration).plan
    assert plan.sites[0].select == PrefixTokens(0.25)
    assert compressed(small, PrefixKV(0.25) | SnapKV(), calibration).plan.sites[0].select == SnapKV(
        0.25
    )


@pytest.mark.parametrize("lengths", [(120,), (120, 60)], ids=str)
def test_online_counts_are_those_of_the_exact_search(small, lengths):
    """Recomputed per row of a padded batch from the model's own attention weights."""
    prompt = left_padded(lengths)
    held = compressed(small, ONLINE)(**prompt).past_key_values.state.buffers
    before = small.config._attn_implementation
    small.set_attn_implementation("eager")
    weights = small(**prompt, output_attentions=True, use_cache=False).attentions
    small.set_attn_implementation(before)
    for row, tokens in enumerate(lengths):
        columns = [weight[row, :, -tokens:, -tokens:].double().sum(1).mean(0) for weight in weights]
        # the first and the newest token stay in every layer
        free = [column[1:-1] for column in columns]
        total = 5 * -(-tokens // 4)
        expected = [2 + count for count in prefix_counts(free, total - 10, 0)]
        found = [int(buffers["length"][row, 0]) for buffers in held]
        assert sum(found) == total
        assert found == expected


def test_both_searches_spend_the_budget(small, calibration):
    found = [
        compressed(small, PrefixKV(0.25, search=search), calibration).plan
        for search in ("exact", "bisect")
    ]
    for plan in found:
        assert sum(site.schedule.kept(400, 400) for site in plan.sites) == 5 * 100
    pairs = zip(*(plan.policy.parts()[0].shares for plan in found), strict=True)
    assert all(abs(exact - halved) < 0.1 for exact, halved in pairs)
    with pytest.raises(PolicyError, match="search must be one of 'exact', 'bisect'"):
        PrefixKV(search="other")
    with pytest.raises(PolicyError, match="on the device the search sorts"):
        PrefixKV(online=True, search="bisect")


def test_online_memory_is_given_back(small):
    past = compressed(small, ONLINE)(**left_padded((200,))).past_key_values
    dense = compressed(small, Full())(**left_padded((200,))).past_key_values
    for buffers in past.state.buffers:
        assert buffers["k_cache"].shape[2] == int(buffers["length"][0, 0]) + 64
    assert past.nbytes() < 0.7 * dense.nbytes()


@pytest.mark.parametrize(
    "policy",
    [
        ONLINE,
        PrefixKV(40, online=True),
        ONLINE | SnapKV(window=4, interval=8),
        ONLINE | KeyDiff(interval=8),
        ONLINE | SnapKV(window=4, interval=8) | KIVI(8, residual=0),
    ],
    ids=repr,
)
def test_online_conversations_go_on(small, policy):
    fast = compressed(small, policy)
    past = fast.new_cache()
    logits = fast(**left_padded((120, 60)), past_key_values=past, logits_to_keep=1).logits
    for turn in range(2):
        for _ in range(12):
            assert bool(logits.isfinite().all())
            logits = fast(logits[:, -1:].argmax(-1), past_key_values=past).logits
        if turn == 0:
            more = left_padded((90, 90))
            logits = fast(**more, past_key_values=past, logits_to_keep=1).logits
    assert past.state.positions == [120 + 114, 60 + 114]


def test_a_whole_budget_changes_nothing(small):
    full, online = compressed(small, Full()), dataclasses.replace(ONLINE, budget=1.0)
    prompt = left_padded((60, 30))
    assert torch.equal(compressed(small, online)(**prompt).logits, full(**prompt).logits)
    past = compressed(small, online)(**prompt).past_key_values
    assert [buffers["length"].tolist() for buffers in past.state.buffers] == [
        [[60] * 2, [30] * 2]
    ] * 5
