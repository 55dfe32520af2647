"""ExactPrefix: what prompts begin with is computed once, and changes nothing."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import EPIC, KIVI, ExactPrefix
from kvfx.errors import PolicyError
from kvfx.policies import policy_named
from kvfx.policy import compose
from kvfx.reuse import Pool
from kvfx.testing.prompts_in_pieces import QUESTION, A, B, C, counts, dense, reply


def test_what_it_looks_for():
    policy = ExactPrefix()
    assert (policy.finds, policy.check, policy.leading, policy.repairs) == ("prefix", None, 0, 0)
    assert not policy.approximate
    assert repr(policy) == "ExactPrefix()"


def test_it_has_no_knobs():
    with pytest.raises(PolicyError, match="ExactPrefix"):
        policy_named("ExactPrefix(2)")


def test_it_is_read_from_text():
    policy = policy_named("ExactPrefix()")
    assert policy == ExactPrefix()
    assert repr(policy) == repr(ExactPrefix())
    assert policy_named(repr(policy)) == policy
    assert (policy.role, policy.roles()) == ("reuse", ("reuse",))


def test_it_composes_with_a_store(small):
    both = KIVI(8, residual=0) | ExactPrefix()
    assert policy_named(repr(both)) == both
    fast = kvfx.compress(small, both, compile=False, verify=False)
    plain = kvfx.compress(small, KIVI(8, residual=0), compile=False, verify=False)
    assert fast.memory(1, 100, 10) == plain.memory(1, 100, 10)
    with pytest.raises(PolicyError, match="reuse"):
        compose(ExactPrefix(), EPIC(2))


def test_prompts_share_their_beginning(fast, small):
    pool = Pool(fast, ExactPrefix(), verify="always")
    for pieces, exact in (
        ([A, B, QUESTION], 0),
        ([A, B, C, QUESTION], 38),
        ([A, C, B, QUESTION], 21),
        ([B, A, QUESTION], 0),
        ([A, B, C, QUESTION], 57),
    ):
        pre = pool.prefill(pieces)
        assert counts(pre.served) == (exact, 0, 0, pre.served.tokens - exact)
        assert torch.equal(reply(fast, pre), dense(small, pre))
    # keys are turned in fp32
    assert all(audit.agrees and abs(audit.kl) < 1e-6 for audit in pool.totals.audits)
