"""NaiveReuse: pieces as they were computed alone, where they stand now."""

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
    policy = NaiveReuse()
    assert (policy.finds, policy.check, policy.leading, policy.repairs) == ("pieces", None, 0, 0)
    assert policy.approximate
    assert repr(policy) == "NaiveReuse()"


def test_it_has_no_knobs():
    with pytest.raises(PolicyError, match="NaiveReuse"):
        policy_named("NaiveReuse(2)")


def test_it_is_read_from_text():
    policy = policy_named("NaiveReuse()")
    assert policy == NaiveReuse()
    assert repr(policy) == repr(NaiveReuse())
    assert policy_named(repr(policy)) == policy
    assert (policy.role, policy.roles()) == ("reuse", ("reuse",))


def test_it_composes_with_a_store(small):
    both = KIVI(8, residual=0) | NaiveReuse()
    assert policy_named(repr(both)) == both
    fast = kvfx.compress(small, both, compile=False, verify=False)
    plain = kvfx.compress(small, KIVI(8, residual=0), compile=False, verify=False)
    assert fast.memory(1, 100, 10) == plain.memory(1, 100, 10)
    with pytest.raises(PolicyError, match="reuse"):
        compose(NaiveReuse(), EPIC(2))


def test_rows_are_those_of_pieces_alone(fast, small):
    """Values as they were, keys turned to where they are: by transformers' own cache."""
    pool = Pool(fast, NaiveReuse())
    pool.prefill([A, B, C, QUESTION])
    pre = pool.prefill([C, B, QUESTION])
    assert counts(pre.served) == (19, 17, 0, 5)
    positions = torch.arange(19, 36)[None]
    alone = small(torch.tensor([B]), position_ids=positions).past_key_values
    for index, buffers in enumerate(pre.cache.state.buffers):
        for name, expected in (
            ("k_cache", alone.layers[index].keys), ("v_cache", alone.layers[index].values)
        ):  # fmt: skip
            found = buffers[name][:, :, 19:36]
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max())


def test_the_first_piece_is_exact(fast, small):
    pool = Pool(fast, NaiveReuse())
    pool.add(A)
    pre = pool.prefill([A, QUESTION])
    assert counts(pre.served) == (21, 0, 0, 5)
    assert torch.equal(reply(fast, pre), dense(small, pre))


def test_pieces_do_not_know_each_other(fast):
    pool = Pool(fast, NaiveReuse(), verify="always")
    for _ in range(2):
        pool.prefill([A, B, C, QUESTION])
    first, second = pool.totals.audits
    assert abs(first.kl) < 1e-6 < 1e-3 < second.kl
