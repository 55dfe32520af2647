"""EPIC: the first tokens of every piece but the first are computed again."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import EPIC, KIVI, NaiveReuse
from kvfx.errors import PolicyError
from kvfx.policies import policy_named
from kvfx.policy import compose
from kvfx.reuse import Pool
from kvfx.testing.prompts_in_pieces import QUESTION, A, B, C, counts, dense, reply


def test_what_it_looks_for():
    policy = EPIC()
    assert (policy.finds, policy.check, policy.leading, policy.repairs) == ("pieces", None, 2, 0)
    assert EPIC(7).leading == 7
    assert policy.approximate
    assert repr(policy) == "EPIC(k=2)"
    assert policy.paper.endswith("2410.15332")


def test_it_is_read_from_text():
    policy = policy_named("EPIC(5)")
    assert policy == EPIC(5)
    assert repr(policy) == repr(EPIC(5))
    assert policy_named(repr(policy)) == policy
    assert (policy.role, policy.roles()) == ("reuse", ("reuse",))


def test_it_composes_with_a_store(small):
    both = KIVI(8, residual=0) | EPIC(5)
    assert policy_named(repr(both)) == both
    fast = kvfx.compress(small, both, compile=False, verify=False)
    plain = kvfx.compress(small, KIVI(8, residual=0), compile=False, verify=False)
    assert fast.memory(1, 100, 10) == plain.memory(1, 100, 10)
    with pytest.raises(PolicyError, match="reuse"):
        compose(EPIC(5), NaiveReuse())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": -1}, r"EPIC\(k=-1\)"),
        ({"k": 1.5}, "EPIC"),
    ],
    ids=str,
)
def test_a_wrong_knob_is_named(knobs, message):
    with pytest.raises(PolicyError, match=message):
        EPIC(**knobs)


@pytest.mark.parametrize("k", [0, 1, 2, 17, 18])
def test_the_first_tokens_are_computed_again(k, fast):
    pool = Pool(fast, EPIC(k))
    pool.prefill([A, B, C, QUESTION])
    served = pool.prefill([C, A, B, QUESTION]).served
    again = min(k, 21) + min(k, 17)
    assert counts(served) == (19, 38 - again, again, 5)


@pytest.mark.parametrize("k", [21, 1000])
def test_with_whole_pieces_it_is_dense(k, fast, small):
    pool = Pool(fast, EPIC(k), verify="always")
    for pieces in ([A, B, C, QUESTION], [C, A, B, QUESTION]):
        pre = pool.prefill(pieces)
        assert pre.served.approximate == 0
        assert torch.equal(reply(fast, pre), dense(small, pre))
    assert all(abs(audit.kl) < 1e-6 for audit in pool.totals.audits)


def test_without_tokens_it_is_naive(fast):
    caches = []
    for policy in (EPIC(0), NaiveReuse()):
        pool = Pool(fast, policy)
        pool.prefill([A, B, C, QUESTION])
        caches.append(pool.prefill([C, A, B, QUESTION]).cache.state.tensors())
    assert all(torch.equal(x, y) for x, y in zip(*caches, strict=True))


def test_more_tokens_are_nearer(fast):
    found = []
    for k in (0, 20):
        pool = Pool(fast, EPIC(k), verify="always")
        for pieces in ([A, B, C, QUESTION], [C, A, B, QUESTION]):
            pool.prefill(pieces)
        found.append(pool.totals.audits[-1].kl)
    assert found[0] > 10 * found[1]
