"""Gemma-3 270M, where its packages are installed: the same tokens for prompts beyond its window."""

from __future__ import annotations

import importlib.util

import pytest

import kvfx
from kvfx import models
from kvfx.testing.text import passages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(module) is None
            for module in models.PACKAGED["gemma3-270m"].modules
        ),
        reason="the packages of gemma3-270m are not installed",
    ),
]
# its window is 512
LENGTHS = (600, 1100, 1600)
NEW = 24
TIE = 1e-3


@pytest.fixture(scope="module")
def gemma():
    return models.load("gemma3-270m")


@pytest.fixture(scope="module")
def fast(gemma):
    return kvfx.compress(gemma[0], kvfx.Full(), compile=False)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_same_tokens_beyond_the_window(gemma, fast, length):
    model, tokenizer = gemma
    text = " ".join(passages())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    greedy = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    reply = model.generate(ids, **greedy, return_dict_in_generate=True, output_logits=True)
    found = fast.generate(ids, **greedy)
    differs = (found != reply.sequences).nonzero()
    if len(differs) > 0:
        best = reply.logits[int(differs[0, 1]) - length][0].topk(2).values
        assert float(best[0] - best[1]) < TIE
    held = fast(ids, logits_to_keep=1).past_key_values.state.buffers
    rings = [x for plan, x in zip(fast.plan.sites, held, strict=True) if plan.site.window]
    assert {x["k_cache"].shape[2] for x in rings} == {512}
    assert len(rings) == 15
