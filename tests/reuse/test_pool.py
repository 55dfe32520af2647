"""Whole prompts through pools, with the original model on the same ids as oracle: properties KS-1,
KS-2, KS-7 and KC-12 of specs/reuse.md.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import pytest
import torch

import kvfx
from kvfx import EPIC, CacheBlend, ExactPrefix, Full, KVShare, NaiveReuse
from kvfx.errors import CapacityExceeded, InputError, PolicyError, UnsupportedShape
from kvfx.reuse import Layout, Pool, SegmentStore
from kvfx.reuse.repaired import RepairedState
from kvfx.testing.tiny import tiny, tiny_gemma3, tiny_llama

FRAGMENTS = {"least": 8, "window": 4}
EXACT = (ExactPrefix(), EPIC(100), CacheBlend(1.0), KVShare(1.0, **FRAGMENTS))
APPROXIMATE = (NaiveReuse(), EPIC(2), CacheBlend(0.2), KVShare(0.2, **FRAGMENTS))
# keys are turned in fp32
FLOOR = 2e-5


@pytest.fixture(scope="module")
def parts(some):
    """Three pieces and a question."""
    return [some(count, seed) for seed, count in enumerate((21, 17, 19, 6), 1)]


@pytest.fixture(scope="module")
def prompts(parts):
    """The same pieces in other orders: 43, 62, 43 and 62 tokens before the last."""
    a, b, c, question = parts
    return [[a, b, question], [b, c, a, question], [a, b, question], [a, c, b, question]]


def counts(served):
    return served.exact, served.approximate, served.repaired, served.computed


@pytest.mark.parametrize("policy", EXACT, ids=repr)
def test_what_is_exact_is_dense(policy, fast, model, read, reply, prompts):
    pool = Pool(fast, policy, verify="always")
    for pieces in prompts:
        pre = pool.prefill(pieces)
        assert sum(counts(pre.served)) == pre.served.tokens == pre.input_ids.shape[1] - 1
        assert pre.served.approximate == 0
        expected = reply(model, pre.input_ids)
        assert torch.equal(reply(fast, pre.input_ids, pre.cache), expected)
        logits = model(pre.input_ids).logits[0, -1]
        again = pool.prefill(pieces)
        assert (read(fast, again) - logits).abs().max() < FLOOR * logits.abs().max()
    assert len(pool.totals.audits) == 8
    assert all(abs(each.kl) < 1e-9 and each.agrees for each in pool.totals.audits)
    assert pool.totals.tokens - pool.totals.computed > 200


@pytest.mark.parametrize("policy", APPROXIMATE, ids=repr)
def test_what_is_approximate_is_said_to_be(policy, fast, model, prompts):
    pool = Pool(fast, policy, verify="always")
    found = [pool.prefill(pieces) for pieces in prompts]
    assert found[0].served.computed == 43
    assert found[1].served.approximate > 0
    kinds = [audit.kl > 1e-6 for audit in pool.totals.audits]
    assert kinds == [each.served.approximate > 0 for each in found]
    logits = fast(found[1].input_ids[:, -1:], past_key_values=found[1].cache).logits
    expected = model(found[1].input_ids).logits[:, -1:]
    assert logits.shape == expected.shape
    if found[1].cache.state.columns == 62:
        assert not torch.allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("policy", [ExactPrefix(), KVShare(0.2, **FRAGMENTS)], ids=repr)
def test_an_identical_request_is_read_from_the_store(
    policy, fast, model, reply, parts, monkeypatch
):
    """KS-7: nothing is computed but the last token, which `generate` reads; what ExactPrefix asks
    is new, so it is cut off here.
    """
    pool = Pool(fast, policy)
    pieces = [*parts[:3], parts[3][:1]]
    pool.prefill(pieces)
    monkeypatch.setattr(pool.runner, "partial", None)
    monkeypatch.setattr(pool.runner, "precheck", None)
    pre = pool.prefill(pieces)
    assert counts(pre.served) == (57, 0, 0, 0)
    assert pre.served.hit_rate == 1.0
    assert not isinstance(pre.cache.state, RepairedState)
    expected = reply(model, pre.input_ids)
    assert torch.equal(reply(fast, pre.input_ids, pre.cache), expected)


def test_exact_prefixes_grow_piece_by_piece(fast, parts):
    pool = Pool(fast, ExactPrefix())
    a, b, c, question = parts
    expected = (
        ([a, question], 0), ([a, b, question], 21), ([a, b, c, question], 38),
        ([a, b, c, question], 57), ([b, a, question], 0), ([b, question], 17),
        ([a, c, b, question], 21), ([c, b, question], 0),
    )  # fmt: skip
    for pieces, exact in expected:
        served = pool.prefill(pieces).served
        assert counts(served) == (exact, 0, 0, served.tokens - exact)
    assert pool.totals.exact == sum(exact for _, exact in expected)


@pytest.mark.parametrize("policy", APPROXIMATE, ids=repr)
def test_approximate_rows_are_never_exact_prefixes(policy, fast, parts):
    """KC-12: what later asks for exact rows gets those that were computed alone, and no others."""
    store = SegmentStore.of(fast)
    a, b, c, question = parts
    pool = Pool(fast, policy, store=store)
    for pieces in ([a, b, question], [c, b, a, question], [question, b, c, a, question]):
        pool.prefill(pieces)
    assert pool.totals.approximate > 0
    exact = Pool(fast, ExactPrefix(), store=store, verify="always")
    for pieces in ([c, b, a, question], [b, a, c, question], [a, b, c, question]):
        served = exact.prefill(pieces).served
        assert served.exact in (0, len(pieces[0]))
        assert counts(served) == (served.exact, 0, 0, served.tokens - served.exact)
    assert all(audit.kl < 1e-9 for audit in exact.totals.audits)


def test_a_piece_can_be_added(fast, parts):
    a, b, _, question = parts
    pool = Pool(fast, EPIC(3))
    key = pool.add(b)
    assert [each.key for each in pool.store.segments()] == [key]
    assert counts(pool.prefill([a, b, question]).served) == (0, 14, 3, 26)
    assert pool.totals.calls == 1


class Words:
    """A tokenizer with one token per word, and a token before texts that ask for it."""

    special_tokens_map: ClassVar = {"bos_token": "<s>"}

    def __call__(self, text, *, add_special_tokens=True, verbose=False):
        return {"input_ids": [1] * add_special_tokens + [3 + len(word) for word in text.split()]}

    def get_vocab(self):
        return {"<s>": 1}


def test_texts_are_pieces(fast, model, reply):
    pool = Pool(fast, ExactPrefix(), tokenizer=Words())  # pyright: ignore[reportArgumentType]
    texts = ["you are a terse helper", "a document of some words", "what is it about"]
    pre = pool.prefill(texts)
    assert pre.input_ids.tolist() == [[1, 6, 6, 4, 8, 9, 4, 11, 5, 7, 8, 7, 5, 5, 8]]
    assert pool.prefill(texts).served.exact == 11
    expected = reply(model, pre.input_ids)
    assert torch.equal(reply(fast, pre.input_ids, pre.cache), expected)


@pytest.mark.parametrize("policy", [ExactPrefix(), EPIC(2), KVShare(0.2, **FRAGMENTS)], ids=repr)
def test_what_was_evicted_is_computed(policy, fast, prompts):
    """Room for two pieces or one prompt, and for nothing."""
    for memory in (200_000 if isinstance(policy, KVShare) else 130_000, 1):
        pool = Pool(fast, policy, store=SegmentStore.of(fast, memory=memory), verify="always")
        for pieces in (*prompts, *prompts):
            served = pool.prefill(pieces).served
            assert sum(counts(served)) == served.tokens
        assert pool.store.nbytes <= memory
        stats = pool.store.stats
        assert (stats.evictions if memory > 1 else stats.refusals) > 0
        exact = not policy.approximate or memory == 1
        assert all(audit.kl < 1e-9 for audit in pool.totals.audits) or not exact
        assert (pool.totals.computed < pool.totals.tokens) == (memory > 1)


@pytest.mark.parametrize("policy", [ExactPrefix(), KVShare(0.2, **FRAGMENTS)], ids=repr)
def test_a_folder_is_used_by_the_next_pool(policy, fast, prompts, tmp_path):
    Pool(fast, policy, store=SegmentStore.of(fast, folder=tmp_path)).prefill(prompts[0])
    pool = Pool(fast, policy, store=SegmentStore.of(fast, folder=tmp_path), verify="always")
    served = pool.prefill(prompts[0]).served
    assert served.exact == (38 if isinstance(policy, ExactPrefix) else 43)
    assert pool.totals.audits[0].kl < 1e-9
    other = kvfx.compress(tiny_llama(layers=3, head_dim=32), Full(), compile=False, verify=False)
    pool = Pool(other, policy, store=SegmentStore.of(other, folder=tmp_path))
    assert pool.prefill(prompts[0]).served.exact == 0


def test_another_models_rows_are_refused(fast, prompts):
    """They have no place in a store that was made for this one."""
    store = SegmentStore.of(fast)
    Pool(fast, ExactPrefix(), store=store).prefill(prompts[0])
    other = kvfx.compress(tiny_llama(layers=2, head_dim=32), Full(), compile=False, verify=False)
    with pytest.raises(kvfx.errors.StoreError, match="of another model: its weights"):
        Pool(other, NaiveReuse(), store=store)


@pytest.mark.parametrize("verify", ["off", "always", "sample:0.5"])
def test_audits_are_those_that_were_asked_for(verify, fast, parts):
    pool = Pool(fast, ExactPrefix(), verify=verify)
    layouts = [Layout.of([parts[0][:4], [5, 6 + number]]) for number in range(12)]
    for layout in (*layouts, *layouts):
        pool.prefill(layout)
    chosen = sum(pool.sampled(layout.tokens) for layout in layouts)
    assert len(pool.totals.audits) == 2 * chosen
    assert chosen in {"off": [0], "always": [12], "sample:0.5": range(1, 12)}[verify]


@pytest.mark.parametrize("policy", ["KIVI(8, residual=0)", "StreamingLLM(24)", "KeyDiff(24)"])
def test_rows_are_stored_in_any_format(policy, compressed, prompts, reply):
    """Found or computed: the same cache, and the same text."""
    fast = compressed(policy)
    pool = Pool(fast, ExactPrefix())
    for pieces in prompts:
        first, again = pool.prefill(pieces), pool.prefill(pieces)
        assert again.served.exact > 0
        dense = fast.new_cache()
        fast(first.input_ids[:, :-1], past_key_values=dense)
        for filled in (first.cache, again.cache):
            assert filled.nbytes() == dense.nbytes()
            assert filled.state.entries == dense.state.entries
            for found, expected in zip(filled.state.tensors(), dense.state.tensors(), strict=True):
                if found.is_floating_point():
                    assert torch.allclose(found, expected, atol=1e-2)
        assert torch.equal(
            reply(fast, first.input_ids, first.cache), reply(fast, again.input_ids, again.cache)
        )


def test_repairs_need_a_dense_cache(compressed, fast, prompts):
    policy = KVShare(0.2, **FRAGMENTS)
    for format, repairs in (("Full()", 3), ("KIVI(8, residual=0)", 0), ("StreamingLLM(24)", 0)):
        pool = Pool(compressed(format), policy)
        assert pool.repairs == repairs
        pool.prefill(prompts[0])
        pre = pool.prefill(prompts[1])
        assert pre.served.approximate > 0
        assert isinstance(pre.cache.state, RepairedState) == (repairs > 0)
    del fast


@cache
def windowed():
    model = tiny_gemma3().double()
    return model, kvfx.compress(model, Full(), compile=False, verify=False)


@pytest.mark.parametrize("policy", [*EXACT, KVShare(0.2, repairs=100, **FRAGMENTS)], ids=repr)
def test_sliding_windows(policy, reply, prompts):
    model, fast = windowed()
    pool = Pool(fast, policy, verify="always")
    for pieces in prompts:
        pre = pool.prefill(pieces)
        found = reply(fast, pre.input_ids, pre.cache, new=24)
        if pre.served.approximate == 0:
            assert torch.equal(found, reply(model, pre.input_ids, new=24))
    assert pool.repairs == policy.repairs
    assert pool.totals.exact + pool.totals.repaired > 50


@pytest.mark.parametrize("policy", [ExactPrefix(), EPIC(2), KVShare(0.2)], ids=repr)
def test_a_prompt_of_two_tokens(policy, fast, model, reply):
    pool = Pool(fast, policy, verify="always")
    for pieces in ([[5, 6]], [[5], [6]], [[5], [6]], [[5], [7]]):
        pre = pool.prefill(pieces)
        assert pre.served.tokens == 1
        expected = reply(model, pre.input_ids)
        assert torch.equal(reply(fast, pre.input_ids, pre.cache), expected)
    with pytest.raises(InputError, match="a prompt two"):
        pool.prefill([[5]])


@pytest.mark.parametrize("policy", [ExactPrefix(), KVShare(0.2, **FRAGMENTS)], ids=repr)
def test_a_prompt_that_is_too_long(policy, compressed, prompts):
    pool = Pool(compressed("Full()", 50), policy)
    pool.prefill(prompts[0])
    with pytest.raises(CapacityExceeded, match="do not fit into max_length=50"):
        pool.prefill(prompts[1])


def test_a_conversation_goes_on(fast, model, reply, prompts, some):
    pool = Pool(fast, ExactPrefix())
    pool.prefill(prompts[0])
    pre = pool.prefill(prompts[0])
    first = reply(fast, pre.input_ids, pre.cache)
    second = torch.cat((first, torch.tensor([some(7, 7)])), 1)
    assert torch.equal(reply(fast, second, pre.cache), reply(model, second))
    beams = pool.prefill(prompts[0])
    beams.cache.batch_repeat_interleave(2)
    assert beams.cache.state.batch == 2


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_learned_positions_have_exact_prefixes_alone(architecture, reply, prompts):
    model = tiny(architecture)
    fast = kvfx.compress(model, Full(), compile=False, verify=False)
    pool = Pool(fast, ExactPrefix(), verify="always")
    for pieces in prompts:
        pre = pool.prefill(pieces)
        expected = reply(model, pre.input_ids)
        assert torch.equal(reply(fast, pre.input_ids, pre.cache), expected)
    assert pool.totals.exact == 38 + 21
    assert all(abs(audit.kl) < 1e-4 for audit in pool.totals.audits)
    for policy in APPROXIMATE:
        with pytest.raises(UnsupportedShape, match="moved keys are not those of the model"):
            Pool(fast, policy)


def test_the_policy_may_come_with_the_model(compressed):
    pool = Pool(compressed("KIVI(8, residual=0) | EPIC(3)"))
    assert pool.policy == EPIC(3)
    assert Pool(compressed("Full() | EPIC(3)"), "NaiveReuse()").policy == NaiveReuse()


def test_what_reuses_nothing_is_refused(fast, compressed):
    for policy in (None, "KIVI(8)"):
        with pytest.raises(PolicyError, match="reuses nothing: give one of ExactPrefix, Naive"):
            Pool(fast, policy)
    with pytest.raises(PolicyError, match=r"use kvfx\.reuse\.Agents"):
        Pool(fast, "KVCOMM()")
    for policy in ("SnapKV(20)", "H2O(20)"):
        with pytest.raises(UnsupportedShape, match="ranks tokens by the queries of the prompt"):
            Pool(compressed(policy), ExactPrefix())
    with pytest.raises(InputError, match="use 'off', 'always'"):
        Pool(fast, ExactPrefix(), verify="sometimes")
