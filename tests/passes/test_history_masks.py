"""HistoryMasks: a mask of no known family stays a mask, over everything seen so far."""

import pytest
import torch
from transformers.models.llama import modeling_llama

import kvfx
from kvfx.errors import InputError, UnmatchedAttention
from kvfx.testing.tiny import tiny_llama

TOKENS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))


def every_third(config, inputs_embeds, **_):
    """A causal mask that shows each row itself and every third token: no family has it."""
    rows = torch.arange(inputs_embeds.shape[1])
    seen = (rows <= rows[:, None]) & ((rows % 3 == 0) | (rows == rows[:, None]))
    return seen[None, None].expand(inputs_embeds.shape[0], 1, -1, -1)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(modeling_llama, "create_causal_mask", every_third)
    return tiny_llama(layers=2)


def test_strict_refuses_with_site_reason_and_remedy(model):
    with pytest.raises(UnmatchedAttention) as refusal:
        kvfx.compress(model, "k8v4", compile=False)
    assert "model.layers.1.self_attn: the mask is neither causal nor a causal" in str(refusal.value)
    assert "strict=False keeps them dense" in str(refusal.value)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sites_stay_dense_under_the_models_own_mask(model, compile):
    fast = kvfx.compress(model, "k8v4", compile=compile, strict=False)
    expected = model(TOKENS, use_cache=False).logits
    cache = fast.new_cache()
    pieces = TOKENS.split([1, 5, 1, 1, 3], 1)
    found = torch.cat([fast(piece, past_key_values=cache).logits for piece in pieces], 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert "dense, the model computes the mask" in str(fast.report)


def test_padding_is_refused(model):
    fast = kvfx.compress(model, "k8v4", compile=False, strict=False)
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    with pytest.raises(InputError, match="padded batches cannot be read"):
        fast(TOKENS, attention_mask=mask)


def test_a_model_of_known_masks_has_no_history():
    fast = kvfx.compress(tiny_llama(layers=1), "full", compile=False, verify=False, strict=False)
    assert "history" not in fast.graph("decode").text
