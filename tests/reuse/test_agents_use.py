"""How agents are used: texts and tokenizers, caches of any format, what is computed once, and what
is refused.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

import kvfx
from kvfx.errors import InputError, PolicyError, UnsupportedShape
from kvfx.model import CompressedModel
from kvfx.reuse import Agents, SegmentStore, Slot
from kvfx.reuse import agents as home
from kvfx.reuse.segment import context_hash
from kvfx.testing.live_rows import some_tokens
from kvfx.testing.tiny import tiny_llama


def text(seed: int, length: int = 12) -> list[int]:
    return some_tokens(length, seed).tolist()


TEMPLATE = [text(101, 7), Slot("q"), text(102, 5)]
TWO = [text(103, 6), Slot("q"), text(104, 4), Slot("a"), text(105, 3)]


@cache
def compressed() -> CompressedModel:
    """A tiny model with all its entries kept; shared."""
    return kvfx.compress(tiny_llama(), "Full()", compile=False, verify=False)


def agents(templates=None, policy="KVCOMM()", **options) -> Agents:
    """Agents with one template, "one", or these."""
    return Agents(compressed(), templates or {"one": TEMPLATE}, policy, **options)


def test_verify_says_which_prompts_are_computed_beside():
    for verify, count in (("always", 3), ("off", 0)):
        team = agents(verify=verify)
        for seed in (1, 2, 1):
            team.prefill("one", {"q": text(seed)})
        assert [audit.agrees for audit in team.totals.audits] == [True] * count
        totals = team.totals
        assert (totals.calls, totals.calls_reused) == (3, 1)
        assert (totals.tokens, totals.computed, totals.approximate) == (69, 46, 16)


def test_a_text_is_computed_once(monkeypatch):
    computed = Counter()

    def counted(runner, tokens):
        computed[tuple(tokens)] += 1
        return alone(runner, tokens)

    alone = home.alone
    monkeypatch.setattr(home, "alone", counted)
    store = SegmentStore.of(compressed())
    team = agents({"one": TEMPLATE, "two": TWO}, store=store)
    published = team.publish(text(1))
    for agent in ("one", "two"):
        team.prefill(agent, {"q": text(1), "a": text(2)})
    assert set(computed.values()) == {1}
    assert set(computed) == {tuple(text(1)), tuple(text(2))}
    again = agents(store=store).publish(text(1))
    assert (len(computed), store.stats.misses) == (2, 2)
    assert torch.equal(again.keys, published.keys)
    assert again.content == published.content == context_hash(text(1))


@pytest.mark.parametrize("policy", ["Full()", "KIVI(8)", "KIVI(8) | KVCOMM(max_anchors=3)"])
def test_any_cache_goes_on_from_there(policy):
    model = tiny_llama(layers=2, head_dim=32)
    fast = kvfx.compress(model, policy, compile=False, verify=False)
    team = Agents(fast, {"one": [text(101, 7), Slot("q"), text(102, 50)]})
    assert team.policy.max_anchors == (3 if "KVCOMM" in policy else 20)
    for reused in (False, True):
        call = team.prefill("one", {"q": text(1, 90)})
        assert call.reused == reused
        found = fast.generate(
            call.input_ids, past_key_values=call.cache, max_new_tokens=6, do_sample=False
        )
        plain = fast.generate(call.input_ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(found, plain)


def test_special_tokens_are_in_front_of_the_template_alone():
    backend = Tokenizer(models.WordLevel({"?": 0, "s": 1, "a": 5, "b": 6, "c": 7}, "?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", bos_token="s")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "s $A", None, [("s", 1)]
    )
    assert tokenizer("a")["input_ids"] == [1, 5]
    team = agents({"one": ["a", Slot("q"), "b"]}, tokenizer=tokenizer)
    assert team.prefill("one", {"q": "c"}).input_ids.tolist() == [[1, 5, 7, 6]]
    assert team.prefill("one", {"q": [7, 7]}).input_ids.tolist() == [[1, 5, 7, 7, 6]]


def test_templates_and_calls_that_do_not_fit_are_refused():
    team = agents({"two": TWO})
    for parts, message in (
        ([], "it has nothing"),
        ([Slot("q"), [3]], "it has slot, piece"),
        ([[3], Slot("q")], "it has piece, slot"),
        ([[3], [4], Slot("q"), [5]], "it has piece, piece, slot, piece"),
        ([[3], Slot("q"), Slot("a"), [5]], "it has piece, slot, slot, piece"),
        ([[3], Slot("q"), [4], Slot("q"), [5]], "two slots of one name: q, q"),
        ([[3, 4], Slot("q"), []], "a text without tokens"),
        (["a", Slot("q"), [3]], "texts need a tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            team._template("x", parts)
    with pytest.raises(InputError, match=r"it has piece, slot$"):
        agents({"two": TWO, "x": [[3], Slot("q")]})
    for agent, texts, message in (
        ("three", {}, "there is no agent 'three': two"),
        ("two", {"q": text(1)}, "agent 'two': slots without a text: a"),
        ("two", {"q": "words", "a": text(1)}, "texts need a tokenizer"),
        ("two", {"q": [], "a": text(1)}, "q: a text without tokens"),
    ):
        with pytest.raises(InputError, match=message):
            team.prefill(agent, texts)
    assert team.totals.calls == 0
    assert team.pools["q"].anchors == team.pools["a"].anchors == []


def test_policies_and_models_that_do_not_fit_are_refused():
    with pytest.raises(PolicyError, match="knows no slots: agents need KVCOMM"):
        agents(policy="KVShare()")
    single = kvfx.compress(tiny_llama(layers=1), "Full()", compile=False, verify=False)
    with pytest.raises(UnsupportedShape, match="this model has 1 layers"):
        Agents(single, {"one": TEMPLATE})
    model = tiny_llama(layers=2)
    config = type(model.config)(**{**model.config.to_dict(), "num_key_value_heads": 1})
    config._attn_implementation = "sdpa"
    model.model.layers[1].self_attn = LlamaAttention(config, 1).eval().requires_grad_(False)
    uneven = kvfx.compress(model, "Full()", compile=False, verify=False)
    with pytest.raises(UnsupportedShape, match=r"widths \[\(1, 16, 16\), \(2, 16, 16\)\]"):
        Agents(uneven, {"one": TEMPLATE})
