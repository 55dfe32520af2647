"""CacheBlend: the rows that deviate most at one layer are computed to the end."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import EPIC, KIVI, CacheBlend
from kvfx.errors import KvfxError, PolicyError
from kvfx.policies import policy_named
from kvfx.policy import compose
from kvfx.reuse import Pool
from kvfx.testing.prompts_in_pieces import QUESTION, A, B, C, counts, dense, reply


def test_what_it_looks_for():
    policy = CacheBlend()
    assert (policy.finds, policy.check, policy.leading, policy.repairs) == (
        "pieces",
        "values",
        0,
        0,
    )
    assert CacheBlend(kind="keys").check == "keys"
    assert (policy.ratio, policy.layer) == (0.15, 1)
    assert policy.approximate
    assert repr(policy) == "CacheBlend(ratio=0.15, kind='values', layer=1)"
    assert policy.paper.endswith("2405.16444")


def test_it_is_read_from_text():
    policy = policy_named("CacheBlend(0.3, kind='keys', layer=2)")
    assert policy == CacheBlend(0.3, kind="keys", layer=2)
    assert repr(policy) == repr(CacheBlend(0.3, kind="keys", layer=2))
    assert policy_named(repr(policy)) == policy
    assert (policy.role, policy.roles()) == ("reuse", ("reuse",))


def test_it_composes_with_a_store(small):
    both = KIVI(8, residual=0) | CacheBlend(0.3, kind="keys", layer=2)
    assert policy_named(repr(both)) == both
    fast = kvfx.compress(small, both, compile=False, verify=False)
    plain = kvfx.compress(small, KIVI(8, residual=0), compile=False, verify=False)
    assert fast.memory(1, 100, 10) == plain.memory(1, 100, 10)
    with pytest.raises(PolicyError, match="reuse"):
        compose(CacheBlend(0.3, kind="keys", layer=2), EPIC(2))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": 1.1}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"kind": "attention"}, "kind"),
        ({"layer": -1}, "layer"),
    ],
    ids=str,
)
def test_a_wrong_knob_is_named(knobs, message):
    with pytest.raises(PolicyError, match=message):
        CacheBlend(**knobs)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5])
def test_the_ratio_is_of_the_reused_rows(ratio, fast):
    pool = Pool(fast, CacheBlend(ratio))
    pool.prefill([A, B, C, QUESTION])
    served = pool.prefill([C, A, B, QUESTION]).served
    again = -int(-38 * ratio // 1)
    assert counts(served) == (19, 38 - again, again, 5)


@pytest.mark.parametrize("kind", ["values", "keys"])
def test_all_rows_are_dense(kind, fast, small):
    pool = Pool(fast, CacheBlend(1.0, kind=kind, layer=2), verify="always")
    for pieces in ([A, B, C, QUESTION], [C, A, B, QUESTION]):
        pre = pool.prefill(pieces)
        assert pre.served.approximate == 0
        assert torch.equal(reply(fast, pre), dense(small, pre))
    assert all(abs(audit.kl) < 1e-6 for audit in pool.totals.audits)


@pytest.mark.parametrize("layer", [1, 3])
def test_rows_up_to_the_layer_are_fresh_and_the_worst_beyond(layer, fast):
    """Those chosen deviate most in the sum of squares of their values."""
    pools = [Pool(fast, policy) for policy in (CacheBlend(0.25, layer=layer), EPIC(0), EPIC(99))]
    for pool in pools:
        pool.prefill([A, B, C, QUESTION])
    blended, old, clean = (
        [
            buffers["v_cache"][0, :, 19:57]
            for buffers in pool.prefill([C, A, B, QUESTION]).cache.state.buffers
        ]
        for pool in pools
    )
    deviation = (clean[layer] - old[layer]).square().sum((0, 2))
    worst = set(deviation.topk(10).indices.tolist())
    fresh = (blended[layer] - clean[layer]).abs().amax((0, 2))
    assert float(fresh.max()) < 1e-4
    stale = (blended[-1] - old[-1]).abs().amax((0, 2)) < 1e-4
    assert set((~stale).nonzero().flatten().tolist()) == worst


def test_more_rows_are_nearer(fast):
    found = []
    for ratio in (0.0, 0.9):
        pool = Pool(fast, CacheBlend(ratio), verify="always")
        for pieces in ([A, B, C, QUESTION], [C, A, B, QUESTION]):
            pool.prefill(pieces)
        found.append(pool.totals.audits[-1].kl)
    assert found[0] > found[1]


def test_a_layer_that_there_is_not_is_refused(fast):
    pool = Pool(fast, CacheBlend(layer=9))
    pool.prefill([A, B, QUESTION])
    with pytest.raises(KvfxError):
        pool.prefill([B, A, QUESTION])
