"""Evaluation of the real model: independent truths, and what an independent trial measured."""

from __future__ import annotations

import math

import pytest
import torch

from kvfx import KIVI, Full, KeyDiff, StreamingLLM
from kvfx.eval.results import Results
from kvfx.eval.run import evaluate
from kvfx.eval.suite import Suite
from kvfx.eval.text import corpus, windows

pytestmark = pytest.mark.slow

TEXT = corpus("python")
# KL per token of the trial: 1,024 tokens, 3 windows of 128 scored ones, groups of 32, 32 exact
TRIAL = {(8, 4): 0.0008, (4, 4): 0.0035, (2, 2): 0.195}
# 8 bits: so near to nothing that only the magnitude can agree
NEARLY_NOTHING = 5e-5


def measured(smollm2, policies, tasks, length, **options):
    """The scores by policy."""
    suite = Suite(policies, tasks, (length,), TEXT, 0, **options)
    found = evaluate("smollm2", *smollm2, suite, Results(None), [].append)
    return {each.setting.policy: each.scores for each in found}


def plain_perplexity(model, ids, scored) -> float:
    """A loop of transformers alone, with its own cache, token by token."""
    losses = []
    for window in ids:
        past = model(window[None, : -scored - 1], use_cache=True, logits_to_keep=1).past_key_values
        for place in range(len(window) - scored - 1, len(window) - 1):
            out = model(window[None, place : place + 1], past_key_values=past, use_cache=True)
            losses.append(torch.nn.functional.cross_entropy(out.logits[0], window[None, place + 1]))
    return math.exp(float(torch.stack(losses).mean()))


def test_full_gives_the_perplexity_of_a_plain_loop(smollm2, record_property):
    model, tokenizer = smollm2
    scores = measured(smollm2, (), ("perplexity",), 300, windows=2, scored=33)[repr(Full())]
    ids = windows(TEXT, tokenizer, tokens=300 + 34, count=2, seed=0)
    expected = plain_perplexity(model, ids, 33)
    assert scores.perplexity == pytest.approx(expected, rel=1e-4)
    assert scores.dense_perplexity == pytest.approx(expected, rel=1e-4)
    record_property("KL of Full()", scores.kl)
    assert abs(scores.kl) < 1e-7
    assert scores.flips == 0.0


def test_kivi_costs_what_the_trial_found(smollm2, record_property):
    bits = {pair: KIVI(k_bits=pair[0], v_bits=pair[1], residual=32) for pair in ((8, 8), *TRIAL)}
    found = measured(
        smollm2, tuple(bits.values()), ("perplexity",), 1024, windows=3, scored=128, chunk=32
    )
    for pair, expected in TRIAL.items():
        record_property(f"KL at {pair} bits", found[repr(bits[pair])].kl)
        assert found[repr(bits[pair])].kl == pytest.approx(expected, rel=0.2)
    assert 0.0 < found[repr(bits[8, 8])].kl < NEARLY_NOTHING


def test_key_diff_keeps_the_needle_that_a_stream_drops(smollm2):
    key_diff = KeyDiff(budget=0.25, sinks=4, recent=16)
    stream = StreamingLLM(budget=0.25, positions="absolute")
    found = measured(smollm2, (key_diff, stream), ("needle-noise",), 960, samples=5)
    assert found[repr(Full())].rate == 1.0
    assert found[repr(key_diff)].rate == 1.0
    # nothing but the depths that are recent anyway
    assert found[repr(stream)].rate <= 0.2
