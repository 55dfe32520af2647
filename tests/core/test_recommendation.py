"""What is recommended fits, is ranked by what was measured, and can be compiled."""

from __future__ import annotations

import json

import pytest
import torch

import kvfx
from kvfx import KIVI, Auto, Full, KVTuner, PrefixKV, SnapKV
from kvfx.errors import CapacityExceeded, InputError, PolicyError
from kvfx.recommendation import default_candidates, recommend
from kvfx.testing.tiny import left_padded, tiny_llama

CONTEXT, MEMORY = 400, 200_000
STORES = {"residual": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=3, head_dim=32)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 99, (250,), generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def found(model, prompts):
    candidates = [
        Full(),
        KIVI(4, **STORES),
        SnapKV(window=8),
        PrefixKV() | SnapKV(window=8),
        Auto(1, context=1, residual=0) | SnapKV(window=8),
    ]
    return recommend(
        model, memory=MEMORY, context=CONTEXT, candidates=candidates, prompts=prompts, tokens=150
    )


def test_the_best_is_first_and_everything_fits(found):
    measured = [each for each in found.candidates if each.kl is not None]
    assert [each.kl for each in measured] == sorted(each.kl for each in measured)
    assert all(each.bytes <= MEMORY for each in measured)
    assert len(measured) == 4
    (rest,) = found.candidates[4:]
    assert (rest.policy, rest.kl) == (Full(), None)
    assert rest.reason.startswith("needs ")


def test_bytes_are_those_that_are_allocated(model, found):
    fast = kvfx.compress(model, plan=found.plan, compile=False, verify=False)
    past = fast(**left_padded((CONTEXT,)), logits_to_keep=1).past_key_values
    assert past.nbytes() == found.candidates[0].bytes
    assert fast.plan.policy == found.policy


def test_divergences_are_those_of_the_evaluation(model, prompts, found):
    """Recomputed for one candidate from its logits."""
    chosen = next(
        each for each in found.candidates if [*map(type, each.policy.parts())] == [SnapKV]
    )
    fast = kvfx.compress(model, chosen.policy, compile=False, verify=False)
    kls = []
    for row in prompts:
        ids = row[: found.tokens + 65]
        dense = model(ids[None]).logits[0, -65:-1].double().log_softmax(-1)
        past = fast.new_cache()
        fast(ids[None, :-65], past_key_values=past, logits_to_keep=1)
        logits = [
            fast(part[None], past_key_values=past).logits[0] for part in ids[-65:-1].split(32)
        ]
        other = torch.cat(logits).double().log_softmax(-1)
        kls.append((dense.exp() * (dense - other)).sum(-1).mean())
    assert chosen.kl == pytest.approx(float(torch.stack(kls).mean()), rel=1e-6)


def test_a_dense_cache_that_fits_wins(model, prompts):
    found = recommend(
        model,
        memory="1GiB",
        context=CONTEXT,
        candidates=["full", "kivi-2bit"],
        prompts=prompts,
    )
    assert found.policy == Full()
    best, other = (each.kl for each in found.candidates)
    assert best is not None
    assert other is not None
    assert best < 1e-9 < other


def test_it_can_be_read(found):
    lines = str(found).splitlines()
    assert lines[0].endswith("for batch 1, 400 tokens in 195.3 KiB")
    assert lines[3].startswith(lines[0].split(" for batch")[0])
    assert lines[-1].startswith("not measured: Full(): needs ")
    document = json.loads(json.dumps(found.to_dict()))
    assert document["policy"] == repr(found.policy)
    assert [row["kl"] for row in document["candidates"]][:4] == [
        each.kl for each in found.candidates[:4]
    ]
    assert found.render().row_count == 4


def test_default_candidates_use_fewer_bits_fewer_tokens_and_both():
    roles = [set(policy.roles()) for policy in default_candidates(1000, 100)]
    assert {"store"} in roles
    assert {"select"} in roles
    assert {"select", "store"} in roles
    assert any(isinstance(policy, KVTuner) for policy in default_candidates(1000, 100))


def test_what_cannot_be_recommended_is_refused(model, prompts):
    with pytest.raises(CapacityExceeded, match=r"no candidate fits into 10 B:\n  Full\(\): needs"):
        recommend(model, memory=10, context=100, candidates=["full"], prompts=prompts)
    with pytest.raises(InputError, match="name at least one policy"):
        recommend(model, memory=10, context=100, candidates=[], prompts=prompts)
    with pytest.raises(InputError, match="too short"):
        recommend(model, memory=10, context=100, prompts=[torch.arange(100)])
    with pytest.raises(InputError, match="there is none beside the model"):
        recommend(model, memory="1MiB", context=100)
    with pytest.raises(PolicyError, match="give a policy, a plan, or memory= and context="):
        kvfx.compress(model)
    with pytest.raises(PolicyError, match="for how many tokens"):
        kvfx.compress(model, memory="1MiB")


def test_compress_chooses_by_itself(model, monkeypatch):
    """Without a policy; a tokenizer is read from beside the model's weights."""

    class Letters:
        def __call__(self, text, verbose=False):
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    monkeypatch.setattr("kvfx.recommendation._tokenizer", lambda model: Letters())
    fast = kvfx.compress(model, memory=MEMORY, context=CONTEXT, compile=False, verify=False)
    past = fast(**left_padded((CONTEXT,)), logits_to_keep=1).past_key_values
    assert past.nbytes() <= MEMORY
