"""Layers that have the keys and values of an earlier one read its cache (Gemma-3n)."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx.testing.architectures import tiny_architecture
from kvfx.testing.examine import compare, prompts, through
from kvfx.testing.tiny import left_padded


@pytest.fixture(scope="module")
def model():
    """Four layers: two with a cache, one of them a ring, and two that read those."""
    return tiny_architecture("gemma3n_text")


def test_readers_have_no_cache_of_their_own(model):
    fast = kvfx.compress(model, "full", compile=False)
    assert [site.site.reads for site in fast.plan.sites] == [None, None, 0, 1]
    compare(model, fast)
    cache = fast(**left_padded((40, 22)), logits_to_keep=1).past_key_values
    assert [bool(buffers) for buffers in cache.state.buffers] == [True, True, False, False]
    assert cache.state.nbytes() == fast.memory(batch=2, length=40)
    before = [site.before for site in fast.report.sites]
    assert before[2:] == [0, 0]
    assert before[0] == before[1] > 0
    assert "reads the cache of model.layers.1.self_attn" in str(fast.report)


def test_rows_of_a_turn_are_stored_when_all_have_read(model):
    fast = kvfx.compress(model, "full", compile=False)
    lines = [line for line in fast.graph("extend").text.splitlines() if "kvfx." in line]
    ops = [line.split("kvfx.")[1].split(".")[0] for line in lines if "_dense" in line]
    assert ops == ["extend_dense", "extend_dense", "store_dense"]


@pytest.mark.parametrize(
    "policy",
    [
        kvfx.KIVI(bits=8, residual=0),
        kvfx.H2O(budget=16, interval=8),
        kvfx.PyramidKV(budget=20) | kvfx.SnapKV(window=4, interval=8),
        kvfx.AdaKV() | kvfx.SnapKV(budget=16, window=4, interval=8),
        kvfx.KVMerger(budget=16, interval=8) | kvfx.KIVI(bits=4, residual=0),
    ],
    ids=lambda policy: type(policy.parts()[0]).__name__,
)
def test_policies_run_on_shared_caches(model, policy):
    """Readers see what is left: the same entries as the layer that owns them."""
    fast = kvfx.compress(model, policy, compile=False)
    out = through(fast, *prompts(), shift=0)
    assert bool(torch.isfinite(out).all())
    cache = fast(**left_padded((40, 22)), logits_to_keep=1).past_key_values
    assert cache.state.nbytes() == fast.memory(batch=2, length=40)


def test_compiled_and_cropped(model):
    fast = kvfx.compress(model, kvfx.Full())
    options = {"max_new_tokens": 8, "do_sample": False}
    prompt = left_padded((40, 22))
    assert torch.equal(fast.generate(**prompt, **options), model.generate(**prompt, **options))


def test_keys_that_move_are_not_shared():
    """Where keys are rotated to their place in the cache, queries of readers would miss them."""
    model = tiny_architecture("gemma3n_text")
    fast = kvfx.compress(model, kvfx.StreamingLLM(budget=16, positions="cache"), compile=False)
    # the ring of the windowed layer moves no keys
    assert [site.reads for site in fast.plan.sites] == [None, None, 0, None]
