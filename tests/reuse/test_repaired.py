"""A cache that is repaired while it is read (KS-5 and KS-6 of specs/reuse.md), and used as one."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import kvfx
from kvfx import KVShare
from kvfx.errors import CapacityExceeded, InputError, UnsupportedOperation
from kvfx.reuse import Pool
from kvfx.reuse.repaired import RepairedState
from kvfx.testing.tiny import tiny_llama

ALL = 100
# keys are turned in fp32
FLOOR = 2e-5


@pytest.fixture(scope="module")
def prefilled(fast, some):
    """A prompt of 44 tokens: 36 approximate rows, or a fifth fewer, and too few new ones to be
    stored itself.
    """
    a, b, c, question = (some(count, seed) for seed, count in enumerate((21, 17, 19, 6), 1))

    @cache
    def pool_of(fast):
        pool = Pool(fast, KVShare(0.0, least=8, window=4))
        pool.prefill([a, b, c, question])
        return pool

    def prefilled(repairs: int, ratio: float = 0.0, fast=fast):
        pool = pool_of(fast)
        # its programs do not depend on these
        pool.policy = KVShare(ratio, repairs=repairs, least=8, window=4)
        return pool.prefill([question[:2], c, b, question])

    return prefilled


def greedy(fast, cache, token, steps):
    """The tokens that follow, one program after the other."""
    found = []
    for _ in range(steps):
        logits = fast(torch.tensor([[token]]), past_key_values=cache).logits
        token = int(logits[0, -1].argmax())
        found.append(token)
    return found


def error(state, runner):
    """The largest difference of any row from those of a dense run, relative to the largest."""
    count = len(state.tokens)
    clean = runner.rows(count)
    runner.dense(clean, state.tokens)
    pairs = zip(state.tensors(), (x for x in (*clean.keys, *clean.values)), strict=True)
    return max(float((x[:, :, :count] - y).abs().max() / y.abs().max()) for x, y in pairs)


def test_all_repairs_at_once_are_dense(prefilled, fast, model, runner, reply):
    """KS-6: the first step computes all approximate rows and those behind them, so whatever follows
    is dense.
    """
    pre = prefilled(ALL)
    state = pre.cache.state
    assert isinstance(state, RepairedState)
    assert pre.served.approximate == 36
    first, count = state.dense, state.columns
    assert not state.deviation[:, :first].any()
    assert state.deviation[:, first].any()
    assert error(state, runner) > 1e-2
    found = reply(fast, pre.input_ids, pre.cache, new=12)
    assert torch.equal(found, reply(model, pre.input_ids, new=12))
    assert state.repaired == list(range(first, count))
    assert state.dense == state.columns
    assert state.tokens == found[0, :-1].tolist()
    assert error(state, runner) < FLOOR
    assert not state.deviation.any()


def test_logits_of_the_first_step_are_dense(prefilled, fast, model, read):
    pre = prefilled(ALL)
    expected = model(pre.input_ids).logits[0, -1]
    assert (read(fast, pre) - expected).abs().max() < FLOOR * expected.abs().max()


@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_each_step_repairs_the_worst(ratio, prefilled, fast):
    """As the definition has it: attention of the newest row times deviation, summed over heads."""
    pre = prefilled(3, ratio)
    state = pre.cache.state
    token = int(pre.input_ids[0, -1])
    for step in range(1, 5):
        known = state.attention.shape[1]
        score = (state.attention * state.deviation[:, :known]).sum(0)
        expected = sorted(score.argsort(descending=True)[:3].tolist())
        (token,) = greedy(fast, pre.cache, token, 1)
        assert state.repaired[-3:] == expected
        assert len(state.repaired) == len(set(state.repaired)) == 3 * step
        assert not state.deviation[:, expected].any()


def test_without_repairs_there_is_nothing_to_keep(prefilled, fast, model, read):
    """KS-6: it is the prefill alone, in a cache like any other."""
    pre = prefilled(0)
    assert not isinstance(pre.cache.state, RepairedState)
    other = prefilled(1)
    # nothing is left to repair
    other.cache.state.deviation.zero_()
    other.cache.state.dense = other.cache.state.columns
    assert torch.allclose(read(fast, pre), read(fast, other), rtol=0, atol=1e-9)
    assert other.cache.state.repaired == []


def test_repairs_come_nearer(prefilled, fast, runner):
    errors = []
    for repairs in (1, ALL):
        pre = prefilled(repairs)
        greedy(fast, pre.cache, int(pre.input_ids[0, -1]), 6)
        assert len(pre.cache.state.repaired) == min(6 * repairs, 41)
        errors.append(error(pre.cache.state, runner))
    assert errors[0] > 1e-2 > FLOOR > errors[1]


def test_a_few_repairs_a_step_are_dense_in_the_end(prefilled):
    """KS-6, step by step: first what deviates, the worst first, then all rows in order; with
    layers enough for rows to deviate that were computed behind approximate ones.
    """
    model = tiny_llama(layers=5, head_dim=32).double()
    fast = kvfx.compress(model, "full", compile=False, verify=False)
    pre = prefilled(9, fast=fast)
    state = pre.cache.state
    greedy(fast, pre.cache, int(pre.input_ids[0, -1]), 4)
    assert not state.deviation.any()
    assert error(state, state.runner) > 1e-3
    greedy(fast, pre.cache, 5, 6)
    assert state.dense == state.columns
    assert error(state, state.runner) < FLOOR
    assert len(state.repaired) < 9 * 10


def test_several_rows_are_read_without_repairs(prefilled, fast, model, some):
    """A next turn: all logits are those of the rows as they are by then."""
    pre, more = prefilled(ALL), torch.tensor([some(9, 7)])
    state = pre.cache.state
    fast(pre.input_ids[:, -1:], past_key_values=pre.cache)
    assert len(state.repaired) == 41
    ids = torch.cat((pre.input_ids, more), 1)
    expected = model(ids).logits[:, -9:]
    found = fast(more, past_key_values=pre.cache).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < FLOOR * expected.abs().max()
    kept = prefilled(ALL)
    found = fast(ids[:, -10:], past_key_values=kept.cache, logits_to_keep=2).logits
    assert found.shape[:2] == (1, 2)
    assert kept.cache.state.repaired == []
    assert (found - expected[:, -2:]).abs().max() > 1e-3
    # a step of one token repairs what is left, those ten rows too
    token = int(found[0, -1].argmax())
    greedy(fast, kept.cache, token, 1)
    assert len(kept.cache.state.repaired) == 41 + 10
    assert kept.cache.state.dense == kept.cache.state.columns


def test_a_conversation_goes_on(prefilled, fast, model, reply, some):
    pre = prefilled(ALL)
    first = reply(fast, pre.input_ids, pre.cache)
    second = torch.cat((first, torch.tensor([some(7, 7)])), 1)
    assert torch.equal(reply(fast, second, pre.cache), reply(model, second))


def test_rows_grow_in_buckets(prefilled, fast, runner, some):
    pre = prefilled(ALL)
    state = pre.cache.state
    before, bytes_before = state.rows.length, pre.cache.nbytes()
    assert bytes_before == sum(x.nbytes for x in state.tensors())
    fast(pre.input_ids[:, -1:], past_key_values=pre.cache)
    assert state.rows.length == before
    fast(torch.tensor([some(300, 7)]), past_key_values=pre.cache)
    assert state.rows.length > before + 299
    assert pre.cache.nbytes() == bytes_before // before * state.rows.length
    assert pre.cache.get_seq_length() == state.columns == before + 300
    assert state.positions == [before + 300]
    assert int(state.next_position) == before + 300
    assert error(state, runner) < FLOOR


@pytest.mark.parametrize("length", [30, -17])
def test_a_crop_forgets(length, prefilled, fast, model, some):
    pre, more = prefilled(ALL), torch.tensor([some(9, 7)])
    state = pre.cache.state
    fast(pre.input_ids[:, -1:], past_key_values=pre.cache)
    kept = length if length > 0 else state.columns + length
    pre.cache.crop(length)
    assert pre.cache.get_seq_length() == kept
    assert len(state.tokens) == kept
    ids = torch.cat((pre.input_ids[:, :kept], more), 1)
    expected = model(ids).logits[:, -9:]
    found = fast(more, past_key_values=pre.cache).logits
    assert (found - expected).abs().max() < FLOOR * expected.abs().max()


def test_cropped_rows_are_not_repaired(prefilled, fast, runner):
    pre = prefilled(ALL)
    pre.cache.crop(12)
    state = pre.cache.state
    assert not state.deviation[:, 12:].any()
    greedy(fast, pre.cache, 5, 3)
    assert state.repaired
    assert max(state.repaired) < 12
    assert error(state, runner) < FLOOR


def test_one_request_is_one_row(prefilled, fast, reply):
    pre = prefilled(3)
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor([0, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(UnsupportedOperation, match="has one row: beam search and several"):
            change(pre.cache)
    pre.cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(InputError, match="this cache holds 1 rows, the inputs have 2"):
        fast(torch.tensor([[5], [5]]), past_key_values=pre.cache)
    for knobs in ({"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}):
        with pytest.raises((UnsupportedOperation, InputError)):
            reply(fast, pre.input_ids, pre.cache, **knobs)


def test_there_is_an_end(prefilled, compressed):
    pre = prefilled(ALL, fast=compressed("Full()", 70))
    fast = compressed("Full()", 70)
    count = pre.input_ids.shape[1]
    greedy(fast, pre.cache, 5, 70 - count + 1)
    with pytest.raises(CapacityExceeded, match="71 tokens do not fit into max_length=70"):
        greedy(fast, pre.cache, 5, 1)
    assert pre.cache.get_seq_length() == 70
