"""Everything a user can get wrong: each message says what, where, and what to do."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache
from transformers import AutoModelForSeq2SeqLM as Seq2Seq

import kvfx
from kvfx import KIVI, Full, StreamingLLM, models
from kvfx.errors import (
    CaptureError,
    InputError,
    KvfxError,
    ModelNotFound,
    PolicyError,
    UnmatchedAttention,
    UnsupportedOperation,
    UnsupportedShape,
)
from kvfx.testing.tiny import left_padded, tiny_gpt2, tiny_llama

PROMPT = left_padded([6])["input_ids"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}


@cache
def fast():
    """A tiny model with the dense cache."""
    return kvfx.compress(tiny_llama(), Full(), compile=False, verify=False)


def refused(model: nn.Module, error: type[KvfxError], *words: str, policy=None) -> None:
    """`compress` and `explain` both raise `error`, in these words."""
    policy = Full() if policy is None else policy
    for ask in (
        lambda: kvfx.compress(model, policy, compile=False),
        lambda: kvfx.explain(model, policy),
    ):
        with pytest.raises(error) as caught:
            ask()
        for word in words:
            assert word in str(caught.value)


def test_no_model_of_transformers():
    refused(
        nn.Linear(3, 3),
        CaptureError,
        "Linear is not a transformers model",
        "load one with AutoModelForCausalLM",
    )


def test_an_encoder():
    config = AutoConfig.for_model("bert", **SMALL, num_attention_heads=2, intermediate_size=32)
    model = AutoModelForMaskedLM.from_config(config)
    refused(model, CaptureError, "BertForMaskedLM is not a decoder", "AutoModelForCausalLM")


def test_a_decoder_without_a_head():
    refused(
        tiny_llama().model,
        CaptureError,
        "LlamaModel has no language-model head",
        "load it with AutoModelForCausalLM",
    )


def test_an_encoder_decoder():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = Seq2Seq.from_config(AutoConfig.for_model("t5", **sizes, vocab_size=99))
    refused(model, CaptureError, "T5ForConditionalGeneration is an encoder-decoder", "decoder-only")


def test_recurrent_layers():
    config = AutoConfig.for_model("mamba", **SMALL, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    refused(
        model, CaptureError, "MambaForCausalLM has recurrent layers", "their state is no KV cache"
    )


def test_weights_on_two_devices():
    model = tiny_llama()
    model.model.norm.to("meta")
    refused(model, CaptureError, "weights on cpu, meta: put the whole model on one device")


class Mean(nn.Module):
    """A layer that mixes tokens without attention."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.cumsum(1), None


class Bidirectional(nn.Module):
    """Attention that sees the future."""

    def forward(self, hidden_states, **kwargs):
        x = hidden_states.unflatten(-1, (4, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2), None


def test_no_attention():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn = Mean()
    refused(model, CaptureError, "no attention was found")


def test_a_site_that_is_not_understood_is_named_with_its_reason():
    model = tiny_llama()
    model.model.layers[1].self_attn = Bidirectional()
    refused(
        model,
        UnmatchedAttention,
        "1 attention sites of LlamaForCausalLM are not understood",
        "layers.1.self_attn: attention is bidirectional",
    )


def test_a_policy_that_does_not_fit_names_the_site():
    refused(
        tiny_llama(head_dim=16),
        UnsupportedShape,
        "layers.0.self_attn: KIVI(",
        "head_dim 16 is not a multiple of group_size 32",
        "strict=False",
        policy=KIVI(),
    )


def test_cache_positions_without_rotary_embeddings():
    refused(
        tiny_gpt2(),
        UnsupportedShape,
        "no rotary embedding",
        "positions='absolute'",
        policy=StreamingLLM(),
    )


def test_an_unknown_policy():
    refused(
        tiny_llama(),
        PolicyError,
        "there is no policy 'kivi-2bits': did you mean 'kivi-2bit'",
        policy="kivi-2bits",
    )


def test_an_unknown_backend():
    with pytest.raises(
        UnsupportedShape, match="backend 'cuda' does not exist on cpu: choose 'auto'"
    ):
        kvfx.compress(tiny_llama(), Full(), backend="cuda", compile=False)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "/no/such/file.gguf"])
def test_a_missing_model(name):
    with pytest.raises(ModelNotFound) as caught:
        models.load(name)
    assert repr(name) in str(caught.value)
    assert "smollm2" in str(caught.value)


@pytest.mark.parametrize("length", [6, 12])
def test_packed_sequences(length):
    positions = torch.arange(3).repeat(length // 3)[None]
    ids = left_padded([length])["input_ids"]
    with pytest.raises(InputError, match=r"packed sequences.*a row of its own, padded on the left"):
        fast()(ids, position_ids=positions)


def test_positions_that_leave_the_conversation():
    past = fast()(PROMPT).past_key_values
    for ids in (PROMPT, PROMPT[:, :1]):
        with pytest.raises(InputError, match="position_ids do not continue"):
            fast()(ids, position_ids=torch.arange(ids.shape[1])[None], past_key_values=past)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1], [1, 1, 0]], r"row 1 is padded on the right.*padding_side = 'left'"),
        ([[0, 1, 1], [0, 0, 0]], "row 1 is padded"),
        ([[1, 0, 1], [1, 1, 1]], "has holes: padding must be one block on the left"),
        ([[1, 1], [1, 1]], r"attention_mask is \[2, 2\]: expected \[2, 3\]"),
        ([[1, 1, 1]], r"attention_mask is \[1, 3\]: expected \[2, 3\]"),
        ([[[[1, 1, 1]]]], r"attention_mask must be \[batch, length\]"),
    ],
)
def test_a_mask_that_is_no_left_padding(mask, message):
    with pytest.raises(InputError, match=message):
        fast()(PROMPT[:, :3].repeat(2, 1), attention_mask=torch.tensor(mask))


def test_right_padding_in_generate():
    prompt = left_padded([6, 3])
    right = {name: tensor.flip(1) for name, tensor in prompt.items()}
    with pytest.raises(InputError, match=r"row 1 is padded on the right.*padding_side = 'left'"):
        fast().generate(**right, max_new_tokens=3)


def test_a_cache_that_the_model_did_not_make():
    other = kvfx.compress(tiny_llama(), Full(), compile=False, verify=False)
    for past in (DynamicCache(), other.new_cache()):
        for ask in (
            fast(),
            lambda ids, **options: fast().generate(ids, max_new_tokens=2, **options),
        ):
            with pytest.raises(InputError) as caught:
                ask(PROMPT, past_key_values=past)
            assert f"past_key_values is a {type(past).__name__} that" in str(caught.value)
            assert "fast.new_cache()" in str(caught.value)


def test_another_number_of_rows():
    past = fast()(PROMPT).past_key_values
    with pytest.raises(InputError, match="this cache holds 1 rows, the inputs have 2: start a new"):
        fast()(PROMPT.repeat(2, 1), past_key_values=past)
    assert past.get_seq_length() == 6


@pytest.mark.parametrize("name", ["static", "quantized", "dynamic"])
def test_a_cache_implementation_of_transformers(name):
    with pytest.raises(PolicyError, match=rf"cache_implementation='{name}'.*drop the argument"):
        fast().generate(PROMPT, max_new_tokens=2, cache_implementation=name)


def test_embeddings_instead_of_tokens():
    embeddings = torch.zeros(1, 3, 64)
    with pytest.raises(InputError, match="reads input_ids, not inputs_embeds"):
        fast()(inputs_embeds=embeddings)
    with pytest.raises(InputError, match="reads input_ids"):
        fast()()


@pytest.mark.parametrize(
    ("name", "value"),
    [("labels", PROMPT), ("output_attentions", True), ("output_hidden_states", True)],
    ids=["labels", "output_attentions", "output_hidden_states"],
)
def test_what_is_not_computed_is_said(name, value):
    with pytest.raises(UnsupportedOperation, match=f"does not compute {name}: ask the original"):
        fast()(PROMPT, **{name: value})


def test_what_was_not_asked_for_is_not_refused():
    assert fast()(PROMPT, labels=None, output_attentions=False).logits.shape == (1, 6, 99)


def test_no_token_at_all():
    fast = kvfx.compress(tiny_llama(layers=1), "full", compile=False, verify=False)
    with pytest.raises(InputError, match="there is no token to read"):
        fast(torch.zeros(1, 0, dtype=torch.int64))
