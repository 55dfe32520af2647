"""The real model: the same tokens under `Full()`, the pass key under KIVI, the bytes that were
promised.
"""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import KIVI, Full, StreamingLLM
from kvfx.testing.text import LENGTHS, pass_key_prompt, prompts

pytestmark = pytest.mark.slow

NEW = 64
# two logits that are closer than this may swap places by rounding
TIE = 1e-3
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
# every prompt, beside some of other lengths
BATCHES = ((0, 5, 9, 14), (2, 11, 15, 4), (1, 6, 10, 16), (3, 7, 12, 17), (8, 13, 18, 19))
KEY = "71432"


@pytest.fixture(scope="module")
def dense(smollm2):
    """The compiled model with the dense cache."""
    return kvfx.compress(smollm2[0], Full())


@pytest.fixture(scope="module")
def eager(smollm2):
    """The same graphs, run node by node."""
    return kvfx.compress(smollm2[0], Full(), compile=False, verify=False)


@pytest.fixture(scope="module")
def expected(smollm2):
    """Per prompt: its tokens, and the tokens and logits [NEW, V] that the model generates."""
    model, tokenizer = smollm2
    out = []
    for text in prompts(tokenizer):
        ids = tokenizer(text, return_tensors="pt").input_ids
        reply = model.generate(ids, **GREEDY, return_dict_in_generate=True, output_logits=True)
        out.append((ids, reply.sequences[0, ids.shape[1] :], torch.cat(reply.logits)))
    return out


def compare(
    found: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor, record_property
) -> None:
    """Assert the same tokens, or a first difference where the model itself was undecided."""
    differs = (found != expected).nonzero()
    record_property("near tie", len(differs) > 0)
    if len(differs) > 0:
        first = int(differs[0])
        best = logits[first].topk(2).values
        gap = float(best[0] - best[1])
        assert gap < TIE, f"token {first} differs, the model's best two are {gap:.2g} apart"


def check_prompt(fast, example, record_property) -> None:
    """Generate after one prompt; the tokens and every logit are the model's."""
    ids, tokens, logits = example
    reply = fast.generate(ids, **GREEDY, return_dict_in_generate=True, output_logits=True)
    out = reply.sequences[0, ids.shape[1] :]
    compare(out, tokens, logits, record_property)
    if torch.equal(out, tokens):
        largest = float((torch.cat(reply.logits) - logits).abs().max())
        record_property("|logit difference|", largest)
        assert largest < TIE


def check_batch(fast, tokenizer, rows, record_property) -> None:
    """Generate after left-padded prompts; every row gets the tokens of its prompt alone."""
    inputs = tokenizer.pad(
        {"input_ids": [ids[0].tolist() for ids, _, _ in rows]},
        padding_side="left",
        return_tensors="pt",
    )
    out = fast.generate(**inputs, **GREEDY)[:, -NEW:]
    for found, (_, tokens, logits) in zip(out, rows, strict=True):
        compare(found, tokens, logits, record_property)


@pytest.mark.parametrize("index", range(len(LENGTHS)), ids=[f"{n} tokens" for n in LENGTHS])
def test_greedy_tokens_are_the_models(dense, expected, index, record_property):
    check_prompt(dense, expected[index], record_property)


@pytest.mark.parametrize("index", range(len(LENGTHS)), ids=[f"{n} tokens" for n in LENGTHS])
def test_the_eager_graph_gives_them_as_well(eager, expected, index, record_property):
    check_prompt(eager, expected[index], record_property)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_padded_batches_generate_what_each_prompt_does_alone(
    smollm2, dense, expected, batch, record_property
):
    check_batch(dense, smollm2[1], [expected[i] for i in batch], record_property)


def test_an_eager_padded_batch_does_so_as_well(smollm2, eager, expected, record_property):
    check_batch(eager, smollm2[1], [expected[i] for i in BATCHES[0]], record_property)


def asked(tokenizer, depth: float) -> torch.Tensor:
    """About 600 tokens that hide the key at `depth` and ask for it."""
    text = pass_key_prompt(tokenizer, 600, depth, KEY)
    return tokenizer(text, return_tensors="pt").input_ids


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_the_pass_key_survives_quantization(smollm2, depth):
    model, tokenizer = smollm2
    ids = asked(tokenizer, depth)
    assert 590 < ids.shape[1] <= 600
    answers = {}
    for name, either in (("dense", model), *quantized(model)):
        out = either.generate(ids, max_new_tokens=8, do_sample=False)
        answers[name] = tokenizer.decode(out[0, ids.shape[1] :])
    # otherwise the prompt proves nothing
    assert KEY in answers["dense"]
    assert all(KEY in answer for answer in answers.values()), answers


def quantized(model):
    """The model under KIVI with 8 and 4 bits, not compiled: few tokens are asked for."""
    for bits in (8, 4):
        yield f"{bits} bits", kvfx.compress(model, KIVI(bits), compile=False, verify=False)


def test_two_bits_hold_4096_tokens_in_15_percent_of_the_bytes(smollm2):
    model, tokenizer = smollm2
    text = " ".join(prompts(tokenizer)) * 2
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :4096]
    assert ids.shape == (1, 4096)
    sizes = []
    for policy in (KIVI(2), Full()):
        fast = kvfx.compress(model, policy, compile=False, verify=False)
        past = fast(ids, logits_to_keep=1).past_key_values
        assert past.nbytes() == fast.memory(1, 4096)
        sizes.append(past.nbytes())
    assert sizes[0] <= 0.15 * sizes[1]
    # 30 layers, 3 heads, keys and values of 64 fp32 channels, and a length
    assert sizes[1] == 30 * (4096 * 3 * 2 * 64 * 4 + 3 * 4)


def test_streaming_llm_keeps_its_quarter(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(prompts(tokenizer)[13], return_tensors="pt").input_ids
    policy = StreamingLLM(budget=0.25, positions="absolute")
    fast, full = (
        kvfx.compress(model, each, compile=False, verify=False) for each in (policy, Full())
    )
    tokens = ids.shape[1]
    kept = policy.kept(tokens)
    assert kept == -(-tokens // 4)
    found, every = (
        each(ids, logits_to_keep=1).past_key_values.state.buffers for each in (fast, full)
    )
    chosen = [n for n in range(tokens) if n < policy.sinks or n >= tokens - kept + policy.sinks]
    for few, all_ in zip(found, every, strict=True):
        assert few["length"].tolist() == [[kept] * 3]
        assert torch.equal(few["k_cache"][:, :, :kept], all_["k_cache"][:, :, chosen])
        assert torch.equal(few["v_cache"][:, :, :kept], all_["v_cache"][:, :, chosen])
    out = fast.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape[1] == tokens + 4
