"""Prompts that are read and compressed chunk by chunk."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import H2O, KIVI, AdaKV, Full, KVMerger, SnapKV, StreamingLLM
from kvfx.errors import PolicyError
from kvfx.testing.tiny import left_padded, tiny_llama

POLICIES = {
    "full": Full(),
    "streaming": StreamingLLM(budget=20, interval=5),
    "h2o kivi": H2O(budget=40, interval=5) | KIVI(8, residual=32),
    "snapkv adakv": SnapKV(budget=20, window=5, interval=5) | AdaKV(),
    "kvmerger": KVMerger(budget=20, interval=5),
    "threshold": KVMerger(mode="threshold", threshold=0.2, interval=5),
}


def compressed(policy, chunk=None):
    model = tiny_llama(head_dim=32)
    return kvfx.compress(model, policy, prefill_chunk=chunk, compile=False, verify=False)


@pytest.mark.parametrize("chunk", [2, 7, 16, 69, 70, 500])
def test_a_dense_cache_does_not_notice(chunk):
    prompt = left_padded((70, 40, 3))
    whole, parts = compressed(Full()), compressed(Full(), chunk)
    expected, found = whole(**prompt), parts(**prompt)
    real = prompt["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real])
    token = torch.full((3, 1), 5)
    torch.testing.assert_close(
        parts(token, past_key_values=found.past_key_values).logits,
        whole(token, past_key_values=expected.past_key_values).logits,
    )


def test_logits_are_those_that_were_asked_for():
    fast, ids = compressed(Full(), 8), left_padded((30,))["input_ids"]
    every = fast(ids).logits
    assert every.shape[1] == 30
    torch.testing.assert_close(fast(ids, logits_to_keep=3).logits, every[:, -3:])
    rows = torch.tensor([21, 2, 29])
    torch.testing.assert_close(fast(ids, logits_to_keep=rows).logits, every[:, rows])


@pytest.mark.parametrize("name", POLICIES)
def test_batches_and_replies_go_on(name):
    """Rows whose first chunks are all padding, a reply, and a turn in chunks."""
    fast = compressed(POLICIES[name], 16)
    past = fast.new_cache()
    logits = fast(**left_padded((90, 40, 3)), past_key_values=past, logits_to_keep=1).logits
    for turn in range(2):
        for _ in range(8):
            assert bool(logits.isfinite().all())
            logits = fast(logits[:, -1:].argmax(-1), past_key_values=past).logits
        if turn == 0:
            turned = left_padded((37, 37, 37))
            logits = fast(**turned, past_key_values=past, logits_to_keep=1).logits
    assert past.state.positions == [90 + 53, 40 + 53, 3 + 53]


def test_the_dense_prompt_is_never_held():
    """At most the budget, the interval and one chunk more."""
    fast, held = compressed(H2O(budget=40, interval=8), 16), []
    run = fast.executor._run

    def watched(state, program, *args):
        held.append(max(buffers["k_cache"].shape[2] for buffers in state.buffers))
        return run(state, program, *args)

    fast.executor._run = watched
    fast(**left_padded((300,)), logits_to_keep=1)
    assert max(held) <= 40 + 8 + 16
    assert len(held) > 300 / 16


def test_budgets_are_shares_of_the_whole_prompt():
    past = compressed(H2O(budget=0.25, interval=8), 32)(**left_padded((200, 100))).past_key_values
    for buffers in past.state.buffers:
        lengths = buffers["length"][:, 0].tolist()
        assert 50 <= lengths[0] < 50 + 8
        assert 25 <= lengths[1] < 25 + 8


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_what_is_kept_differs_from_one_shot(name):
    """Documented: tokens are ranked by what came before the end of their chunk."""
    policy = {"h2o": H2O(budget=20, interval=4), "snapkv": SnapKV(20, window=5, interval=4)}[name]
    prompt = left_padded((120,))
    caches = [compressed(policy, chunk)(**prompt).past_key_values for chunk in (None, 16)]
    counts = [int(past.state.buffers[0]["length"][0, 0]) for past in caches]
    assert min(counts) >= 20
    kept = [past.state.buffers[0]["k_cache"][0, 0, :20] for past in caches]
    assert not torch.equal(*kept)


@pytest.mark.parametrize("chunk", [0, 1, 2.5, True], ids=str)
def test_a_chunk_is_a_number_of_rows(chunk):
    with pytest.raises(PolicyError, match="prefill_chunk must be an integer of at least 2"):
        compressed(Full(), chunk)
