"""What fits into a memory is what a model then allocates."""

from __future__ import annotations

import json

import pytest
import torch

import kvfx
from kvfx import KIVI, AdaKV, Auto, Full, KVMerger, PerLayer, PyramidKV, SnapKV, StreamingLLM
from kvfx.errors import CapacityExceeded, CaptureError, InputError, PolicyError
from kvfx.fit import bytes_asked, plan
from kvfx.testing.architectures import tiny_architecture
from kvfx.testing.tiny import left_padded, tiny_gemma3, tiny_llama

WIDE = tiny_llama(head_dim=32)


def held(policy: kvfx.Full, batch: int, length: int, new: int) -> int:
    """Bytes that a model allocates for prompts and the tokens after them."""
    model = kvfx.compress(WIDE, policy, compile=False, verify=False)
    past = model(**left_padded([length] * batch), logits_to_keep=1).past_key_values
    for _ in range(new):
        model(input_ids=torch.full((batch, 1), 7), past_key_values=past)
    return past.nbytes()


@pytest.mark.parametrize("policy", [Full(), KIVI(4), SnapKV(0.25)], ids=repr)
def test_the_largest_context_fits_and_one_token_more_does_not(policy):
    found = plan(WIDE, policy, memory="2MiB", batch=2, new=2)
    assert (found.unknown, found.batch, found.new, found.exact) == ("context", 2, 2, True)
    assert held(policy, 2, found.answer, 2) == found.bytes <= 2**21
    assert found.context is not None
    assert held(policy, 2, found.context + 1, 2) > 2**21


@pytest.mark.parametrize("policy", [KIVI(2), SnapKV(0.5) | AdaKV()], ids=repr)
def test_the_largest_batch_fits_and_one_row_more_does_not(policy):
    found = plan(WIDE, policy, memory=2**19, context=100)
    assert (found.unknown, found.context, found.answer) == ("batch", 100, found.batch)
    assert held(policy, found.batch, 100, 0) == found.bytes <= 2**19
    assert held(policy, found.batch + 1, 100, 0) > 2**19


@pytest.mark.parametrize("policy", [SnapKV(0.1), StreamingLLM(budget=0.9) | KIVI(4)], ids=repr)
def test_the_largest_budget_fits_and_more_does_not(policy):
    found = plan(WIDE, policy, memory="180KiB", batch=1, context=300)
    assert found.unknown == "budget"
    assert found.policy == policy.with_budget(found.budget)
    assert held(found.policy, 1, 300, 0) == found.bytes <= 180 * 1024
    more = policy.with_budget(found.budget + 2**-53)
    assert held(more, 1, 300, 0) > 180 * 1024


def test_one_row_is_meant_where_nothing_else_is_said():
    assert plan(WIDE, "full", memory="1MiB") == plan(WIDE, Full(), memory=2**20, batch=1)


def test_what_has_no_budget_fits_or_does_not():
    found = plan(WIDE, Full(), memory="1MiB", batch=1, context=300)
    assert (found.answer, found.bytes) == (None, 2 * (2 * 512 * 2 * 32 * 4 + 8))
    with pytest.raises(CapacityExceeded, match=r"for 1 row of 300 tokens, there are 1,024 "):
        plan(WIDE, Full(), memory="1KiB", batch=1, context=300)


def test_a_plan_can_be_read():
    found = plan(tiny_gemma3(), StreamingLLM(budget=100), memory="3MiB", new=10)
    assert str(found).splitlines() == [
        "StreamingLLM(budget=100): batch 1, any number of tokens, then 10 new ones in 3.0 MiB; "
        "the largest context",
        "site                            policy                              bytes",
        "-------------------------------------------------------------------------",
        "model.layers.0-2.self_attn  x3  WindowRing(window=16)               2,116",
        "model.layers.3.self_attn        StreamingLLM(budget=100) | Full()  20,996",
        "all 4 sites: 27,344 bytes (26.7 KiB) of 3,145,728",
    ]
    assert found.answer is None
    assert list(found.sites.values()) == [2116, 2116, 2116, 20996]


def test_a_plan_is_drawn_and_json():
    found = plan(WIDE, KVMerger(mode="threshold"), memory="3MiB")
    assert found.total().endswith("at most: the data tell how many entries stay")
    assert found.render().row_count == 1
    document = json.loads(json.dumps(found.to_dict()))
    assert document["context"] == found.answer
    assert document["exact"] is False
    assert sum(site["bytes"] for site in document["sites"]) == document["bytes"] == found.bytes
    assert kvfx.policy_named(document["policy"]) == found.policy


def test_budgets_are_replaced_wherever_they_are():
    policy = PerLayer(SnapKV(0.5) | KIVI(4), {0: Full(), -1: StreamingLLM(budget=9)})
    expected = PerLayer(SnapKV(0.1) | KIVI(4), {0: Full(), -1: StreamingLLM(budget=0.1)})
    assert policy.with_budget(0.1) == expected


@pytest.mark.parametrize(
    ("wrong", "error", "reason"),
    [
        ({"memory": "much"}, InputError, "memory='much' is not a size"),
        ({"memory": "8G"}, InputError, "there is no unit 'G'"),
        ({"batch": 0}, PolicyError, "batch must be an integer of at least 1"),
        ({"context": -3}, PolicyError, "context must be an integer of at least 1"),
        ({"context": 3, "batch": 0}, PolicyError, "batch must be an integer of at least 1"),
        ({"new": -1}, PolicyError, "new must be an integer of at least 0"),
        ({"policy": "snapvk"}, PolicyError, "did you mean"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(wrong, error, reason):
    with pytest.raises(error, match=reason):
        plan(WIDE, **{"policy": "snapkv-25%", "memory": "1MiB", **wrong})


def test_a_model_that_cannot_be_captured_is_refused():
    with pytest.raises(CaptureError, match="no attention was found"):
        plan(tiny_architecture("cpmant"), "full", memory="1MiB")


@pytest.mark.parametrize(
    "policy",
    [
        SnapKV("400KiB"),
        SnapKV("400 KiB", window=16) | KIVI(4),
        PyramidKV("400KiB") | SnapKV(0.9),
        PerLayer(SnapKV("400KiB"), {0: KIVI(2)}),
    ],
    ids=repr,
)
def test_budgets_in_bytes_are_those_of_the_whole_cache(policy):
    """They are what `memory=` says, and what is allocated."""
    room = {"batch": 2, "context": 300}
    fast = kvfx.compress(WIDE, policy, **room, compile=False, verify=False)
    expected = kvfx.compress(
        WIDE, policy.with_budget(0.5), memory="400KiB", **room, compile=False, verify=False
    )
    assert fast.plan == expected.plan
    assert fast(**left_padded([300, 300])).past_key_values.nbytes() <= 400 * 1024
    more = kvfx.explain(WIDE, policy, **room).after
    assert more == fast.report.after


def test_budgets_in_bytes_need_to_know_what_is_read():
    with pytest.raises(PolicyError, match="for how many tokens"):
        kvfx.compress(WIDE, SnapKV("1MiB"))
    with pytest.raises(PolicyError, match="bytes are given twice"):
        kvfx.compress(WIDE, SnapKV("1MiB"), memory="1MiB", context=10)
    with pytest.raises(PolicyError, match="depends on what is read"):
        plan(WIDE, SnapKV("1MiB"), memory="1MiB", batch=2)
    with pytest.raises(PolicyError, match="or bytes such as"):
        SnapKV("some")
    with pytest.raises(PolicyError, match="give one, not 2"):
        bytes_asked(PerLayer(SnapKV("1MiB"), {0: SnapKV("2MiB")}))


def test_whose_bytes_count():
    assert bytes_asked(PyramidKV("1MiB") | SnapKV("2MiB")) == 2**20
    assert bytes_asked(SnapKV("1MiB") | KIVI(4)) == 2**20
    assert bytes_asked(SnapKV(0.5) | KIVI(4)) is None
    # it fills its bytes by itself
    assert bytes_asked(Auto("1MiB", context=9) | SnapKV()) is None
    assert bytes_asked(Full()) is None
