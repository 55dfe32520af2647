"""KVShare: fragments of earlier requests, the rows that matter most computed again."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import EPIC, KIVI, KVShare
from kvfx.errors import PolicyError
from kvfx.policies import policy_named
from kvfx.policy import compose
from kvfx.reuse import Pool
from kvfx.testing.prompts_in_pieces import QUESTION, A, B, C, counts, dense, reply, some

SMALL = {"least": 8, "window": 4}


def test_what_it_looks_for():
    policy = KVShare()
    assert (policy.finds, policy.check, policy.leading) == ("fragments", "attention", 0)
    assert (policy.ratio, policy.repairs, policy.layer) == (0.2, 3, 1)
    assert KVShare(semantic=True).finds == "similar"
    assert policy.approximate
    assert repr(policy) == (
        "KVShare(ratio=0.2, repairs=3, layer=1, least=32, window=16, semantic=False)"
    )
    assert policy.paper.endswith("2503.16525")


def test_it_is_read_from_text():
    policy = policy_named("KVShare(0.3, least=8, semantic=True)")
    assert policy == KVShare(0.3, least=8, semantic=True)
    assert repr(policy) == repr(KVShare(0.3, least=8, semantic=True))
    assert policy_named(repr(policy)) == policy
    assert (policy.role, policy.roles()) == ("reuse", ("reuse",))


def test_it_composes_with_a_store(small):
    both = KIVI(8, residual=0) | KVShare(0.3, least=8, semantic=True)
    assert policy_named(repr(both)) == both
    fast = kvfx.compress(small, both, compile=False, verify=False)
    plain = kvfx.compress(small, KIVI(8, residual=0), compile=False, verify=False)
    assert fast.memory(1, 100, 10) == plain.memory(1, 100, 10)
    with pytest.raises(PolicyError, match="reuse"):
        compose(KVShare(0.3, least=8, semantic=True), EPIC(2))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": 1.1}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"repairs": -1}, "repairs"),
        ({"layer": -1}, "layer"),
        ({"least": 0}, "least"),
        ({"window": 0}, "window"),
    ],
    ids=str,
)
def test_a_wrong_knob_is_named(knobs, message):
    with pytest.raises(PolicyError, match=message):
        KVShare(**knobs)


def test_fragments_need_no_layout(fast):
    """A prompt of one piece has the tokens of others somewhere."""
    pool = Pool(fast, KVShare(0.25, **SMALL))
    pool.prefill([A + B + C + QUESTION])
    served = pool.prefill([some(5, 9) + B + C[:9] + some(7, 8)]).served
    assert counts(served) == (0, 19, 7, 11)
    # a run of fewer tokens is computed
    assert counts(pool.prefill([some(9, 7) + B[:7] + some(3, 6)]).served) == (0, 0, 0, 18)


@pytest.mark.parametrize("semantic", [False, True])
def test_all_rows_are_dense(semantic, fast, small):
    """KS-1."""
    pool = Pool(fast, KVShare(1.0, semantic=semantic, **SMALL), verify="always")
    changed = [*A[:9], 7, *A[10:]]
    for pieces in ([A, B, C, QUESTION], [changed, B, C, QUESTION], [C, B, A, QUESTION]):
        pre = pool.prefill(pieces)
        assert pre.served.approximate == 0
        assert torch.equal(reply(fast, pre), dense(small, pre))
    assert pool.totals.repaired > 40
    assert all(abs(audit.kl) < 1e-6 for audit in pool.totals.audits)


def test_one_similar_request_is_aligned(fast):
    pool = Pool(fast, KVShare(0.0, semantic=True, **SMALL))
    pool.prefill([A, B, C, QUESTION])
    changed = [*A[:9], 7, *A[10:]]
    served = pool.prefill([changed, B, C, QUESTION]).served
    # 9 tokens in front, and 52 behind the changed one, of which the last is computed
    assert counts(served) == (9, 51, 1, 1)


def test_an_identical_request_computes_nothing(fast, small):
    """KS-7."""
    pool = Pool(fast, KVShare(**SMALL))
    for _ in range(2):
        pre = pool.prefill([A, B, C, QUESTION])
        assert torch.equal(reply(fast, pre), dense(small, pre))
    assert counts(pre.served) == (62, 0, 0, 0)


@pytest.mark.parametrize("repairs", [0, 2, 1000])
def test_steps_repair_rows(repairs, fast):
    """So many at each step, until none is left, with the four that were computed behind them;
    test_repaired.py has what becomes of them.
    """
    pool = Pool(fast, KVShare(0.0, repairs=repairs, **SMALL))
    pool.prefill([A, B, C, QUESTION])
    pre = pool.prefill([C, some(3, 9), A, B, QUESTION[:1] * 2])
    assert counts(pre.served) == (0, 57, 0, 4)
    reply(fast, pre)
    if repairs:
        assert len(pre.cache.state.repaired) == min(8 * repairs, 57 + 4)


def test_repaired_prompts_are_deeper(fast):
    """What was made of approximate rows is a donor twice more, and then no longer."""
    pool = Pool(fast, KVShare(0.1, **SMALL))
    pool.prefill([A, B, C, QUESTION])
    depths = []
    for seed in range(4):
        last = pool.prefill([some(9, 20 + seed), C if seed else B, some(9, 30 + seed), QUESTION])
        assert last.served.approximate > 0
        depths = sorted(each.depth for each in pool.store.segments())
    assert depths[:2] == [0, 1]
    assert max(depths) <= 2
