"""KVCOMM: its knobs; what it does is in tests/reuse/test_agents.py."""

from __future__ import annotations

import pytest

import kvfx
from kvfx import EPIC, KIVI, KVCOMM
from kvfx.errors import PolicyError
from kvfx.policies import policy_named
from kvfx.policy import compose
from kvfx.reuse import Pool


def test_what_it_looks_for():
    policy = KVCOMM()
    assert (policy.finds, policy.check, policy.leading, policy.repairs) == ("anchors", None, 0, 0)
    assert (policy.gamma, policy.max_anchors, policy.window) == (0.3, 20, 5)
    assert policy.approximate
    assert repr(policy) == (
        "KVCOMM(gamma=0.3, max_anchors=20, window=5, mode='canonical', temperature=0.05, "
        "furthest=0.5, most=4, lengths='strict')"
    )
    assert policy.paper.endswith("2510.12872")


def test_it_is_read_from_text():
    policy = policy_named("KVCOMM(0.5, mode='official', lengths='paper')")
    assert policy == KVCOMM(0.5, mode="official", lengths="paper")
    assert repr(policy) == repr(KVCOMM(0.5, mode="official", lengths="paper"))
    assert policy_named(repr(policy)) == policy
    assert (policy.role, policy.roles()) == ("reuse", ("reuse",))


def test_it_composes_with_a_store(small):
    both = KIVI(8, residual=0) | KVCOMM(0.5, mode="official", lengths="paper")
    assert policy_named(repr(both)) == both
    fast = kvfx.compress(small, both, compile=False, verify=False)
    plain = kvfx.compress(small, KIVI(8, residual=0), compile=False, verify=False)
    assert fast.memory(1, 100, 10) == plain.memory(1, 100, 10)
    with pytest.raises(PolicyError, match="reuse"):
        compose(KVCOMM(0.5, mode="official", lengths="paper"), EPIC(2))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": 1.1}, "gamma"),
        ({"mode": "published"}, "mode"),
        ({"lengths": "equal"}, "lengths"),
        ({"max_anchors": 0}, "max_anchors"),
        ({"window": 0}, "window"),
        ({"most": 0}, "most"),
    ],
    ids=str,
)
def test_a_wrong_knob_is_named(knobs, message):
    with pytest.raises(PolicyError, match=message):
        KVCOMM(**knobs)


def test_a_pool_has_no_slots(small):
    fast = kvfx.compress(small, KIVI(8, residual=0) | KVCOMM(), compile=False, verify=False)
    for policy in (None, KVCOMM(), "KVCOMM()"):
        with pytest.raises(PolicyError, match=r"fills the slots of templates: use kvfx\.reuse\.Ag"):
            Pool(fast, policy)
