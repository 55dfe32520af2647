"""Live rows become the cache that reading the prompt would have left, in every format."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import kvfx
from kvfx.errors import CapacityExceeded, UnsupportedShape
from kvfx.reuse.adopt import Adopter
from kvfx.reuse.runner import LiveRows, Runner
from kvfx.testing.tiny import tiny_gemma3

STORES = (
    "Full()",
    "KIVI(8, residual=32)",
    "KIVI(4, residual=0)",
    "StreamingLLM(20)",
    "KeyDiff(20)",
    "KNorm(20)",
    "StreamingLLM(20) | KIVI(8, residual=0)",
    "PerLayer(KIVI(8, residual=32), layers={0: Full()})",
)
TOKENS = 45


@cache
def gemma():
    """Three windows of 16 and a global site, in fp64, and the programs of reuse on it."""
    from kvfx.compiler import raised_graph
    from kvfx.pass_manager import Trail

    model = tiny_gemma3().double()
    return model, Runner(raised_graph(model, Trail(), strict=True))


@cache
def gemma_fast(policy: str = "Full()"):
    return kvfx.compress(gemma()[0], policy, compile=False, verify=False)


def adopted(fast, runner, tokens):
    """The cache of rows that were all computed; there is room for more of them."""
    rows = runner.rows(len(tokens) + 3)
    for x in (*rows.keys, *rows.values):
        x.normal_()
    runner.dense(rows, tokens)
    return Adopter(fast).cache(rows, tokens)


def filled(fast, tokens):
    cache = fast.new_cache()
    fast(torch.tensor([tokens]), past_key_values=cache)
    return cache


def assert_same_state(found, expected):
    """Every buffer and every count."""
    a, b = found.state, expected.state
    for name in ("columns", "positions", "prompt_tokens", "entries", "capacities", "measured"):
        assert getattr(a, name) == getattr(b, name)
    assert torch.equal(a.next_position, b.next_position)
    assert found.nbytes() == expected.nbytes()
    for mine, other in zip(a.buffers, b.buffers, strict=True):
        assert mine.keys() == other.keys()
        for name, x in mine.items():
            torch.testing.assert_close(x, other[name], rtol=1e-9, atol=1e-9, msg=name)


def go_on(fast, cache, some, steps: int = 12):
    """Logits of decode steps, then of rows that are read at once."""
    found = [
        fast(torch.tensor([[token]]), past_key_values=cache).logits for token in some(steps, 7)
    ]
    found.append(fast(torch.tensor([some(9, 8)]), past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("policy", STORES)
def test_a_cache_is_what_reading_the_prompt_leaves(policy, compressed, runner, some, poison):
    del poison
    fast, tokens = compressed(policy), some(TOKENS, 1)
    found, expected = adopted(fast, runner, tokens), filled(fast, tokens)
    assert_same_state(found, expected)
    assert torch.allclose(go_on(fast, found, some), go_on(fast, expected, some), atol=1e-9)
    assert_same_state(found, expected)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 40])
def test_rings_hold_what_a_prefill_leaves(tokens, some):
    fast, runner = gemma_fast(), gemma()[1]
    assert {site.store.room for site in fast.plan.sites} == {"ring", "dense"}
    prompt = some(tokens, 1)
    found, expected = adopted(fast, runner, prompt), filled(fast, prompt)
    assert_same_state(found, expected)
    steps = [go_on(fast, cache, some, 20) for cache in (found, expected)]
    assert torch.allclose(*steps, atol=1e-9)
    assert_same_state(found, expected)


@pytest.mark.parametrize("policy", ["Full()", "KIVI(8, residual=32)", "StreamingLLM(20)"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_short_prompts(tokens, policy, compressed, runner, some):
    fast, prompt = compressed(policy), some(tokens, 1)
    found, expected = adopted(fast, runner, prompt), filled(fast, prompt)
    assert_same_state(found, expected)
    assert torch.allclose(go_on(fast, found, some), go_on(fast, expected, some), atol=1e-9)


def test_caches_of_the_same_rows_are_not_the_same_memory(fast, runner, some):
    tokens, adopter = some(9, 1), Adopter(fast)
    rows = runner.rows(9)
    runner.dense(rows, tokens)
    first, second = adopter.cache(rows, tokens), adopter.cache(rows, tokens)
    go_on(fast, first, some)
    for x in (*rows.keys, *rows.values):
        x.fill_(float("nan"))
    assert_same_state(second, filled(fast, tokens))


def test_reading_goes_on_as_before(fast, runner, some):
    """The programs of the model are its own again."""
    tokens = some(9, 1)
    before = filled(fast, tokens)
    adopted(fast, runner, some(9, 2))
    assert_same_state(filled(fast, tokens), before)


@pytest.mark.parametrize("policy", ["SnapKV(20)", "H2O(20)", "TOVA(20)", "SnapKV(20) | KIVI(8)"])
def test_rows_have_no_queries(policy, compressed):
    with pytest.raises(
        UnsupportedShape, match=r"ranks tokens by the queries of the prompt, which "
    ):
        Adopter(compressed(policy))


def test_a_prompt_that_is_too_long_is_refused(compressed, runner, some):
    fast = compressed("Full()", 10)
    assert adopted(fast, runner, some(10, 1)).state.columns == 10
    with pytest.raises(CapacityExceeded, match="11 tokens do not fit into max_length=10"):
        adopted(fast, runner, some(11, 1))


def test_rows_stay_as_they_are(fast, runner, some):
    tokens = some(9, 1)
    rows = runner.rows(9)
    runner.dense(rows, tokens)
    copy = LiveRows(tuple(k.clone() for k in rows.keys), tuple(v.clone() for v in rows.values))
    cache = Adopter(fast).cache(rows, tokens)
    go_on(fast, cache, some)
    for x, y in zip((*rows.keys, *rows.values), (*copy.keys, *copy.values), strict=True):
        assert torch.equal(x, y)
