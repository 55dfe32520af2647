"""Two thousand tokens of reply on a cache that does not grow, with the real model."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import KVMerger, SnapKV
from kvfx.testing.text import prompts

TOKENS, WARM_UP = 2000, 200
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("policy", [SnapKV(budget=256), KVMerger(budget=256)], ids=repr)
def test_a_long_reply_on_a_small_cache(smollm2, policy):
    """Constant bytes, nothing compiled after the warm-up, finite logits, a varied reply."""
    model, tokenizer = smollm2
    every = (tokenizer(text, return_tensors="pt").input_ids for text in prompts(tokenizer))
    ids = next(ids for ids in every if ids.shape[1] > 256 + policy.interval)
    fast = kvfx.compress(model, policy, verify=False)
    past, reply = fast.new_cache(), []
    logits = fast(ids, past_key_values=past, logits_to_keep=1).logits
    size = past.nbytes()
    # greedy replies of a small model repeat themselves: drawn ones show more of the cache
    generator = torch.Generator().manual_seed(0)

    def step(logits: torch.Tensor) -> torch.Tensor:
        assert bool(logits.isfinite().all())
        token = torch.multinomial((logits[:, -1] / 0.8).softmax(-1), 1, generator=generator)
        reply.append(int(token))
        logits = fast(token, past_key_values=past).logits
        assert past.nbytes() == size
        return logits

    for _ in range(WARM_UP):
        logits = step(logits)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(TOKENS - WARM_UP):
            logits = step(logits)
    assert past.state.positions == [ids.shape[1] + TOKENS]
    # words of English, not one token over and over
    assert len(set(reply)) > TOKENS / 20
    words = tokenizer.decode(reply).split()
    assert sum(word.strip(".,;:!?\"'()").isalpha() for word in words) > len(words) / 2
