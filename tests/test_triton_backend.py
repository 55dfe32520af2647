"""The whole pipeline on the Triton backend: the reference backend's tokens."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import (
    H2O,
    KIVI,
    AdaKV,
    CaM,
    Full,
    KVCrush,
    KVMerger,
    SnapKV,
    StreamingLLM,
    WeightedKV,
)
from kvfx.errors import UnsupportedShape
from kvfx.testing.tiny import left_padded, tiny_llama, tiny_mistral

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = {
    "full": Full(),
    "streaming": StreamingLLM(budget=20, interval=5),
    "kivi window": KIVI(4, residual=32),
    "kivi published": KIVI(2, residual=32, mode="kivi"),
    "adakv": SnapKV(budget=20, window=5, interval=5) | AdaKV(),
    "kvcrush": H2O(budget=20, interval=5) | KVCrush(),
    "kvmerger": KVMerger(budget=20, sinks=2, interval=5, value_scale="votes"),
    "kvmerger threshold": KVMerger(mode="threshold", threshold=0.2, interval=5),
    "cam kivi": H2O(budget=50, interval=5) | CaM(targets=4) | KIVI(8, residual=0),
    "weightedkv": WeightedKV(budget=20, sinks=2, recent=4, interval=5),
    "kivi mixed": StreamingLLM(budget=70, interval=6) | KIVI(k_bits=8, v_bits=4, residual=32),
}


def conversation(fast) -> torch.Tensor:
    """Logits of a padded prompt, a second turn, and the tokens decoded after each."""
    past, out = fast.new_cache(), []
    for turn, lengths in enumerate(((70, 40), (3, 9))):
        inputs = {name: x.to(DEVICE) for name, x in left_padded(lengths, seed=turn).items()}
        logits = fast(**inputs, past_key_values=past, logits_to_keep=1).logits
        for _ in range(9):
            out.append(logits[:, -1])
            token = logits[:, -1:].argmax(-1)
            logits = fast(token, past_key_values=past).logits
    return torch.stack(out)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_conversation(policy):
    model = tiny_llama(head_dim=32).to(DEVICE)
    found, expected = (
        conversation(
            kvfx.compress(model, POLICIES[policy], backend=backend, compile=False, verify=False)
        )
        for backend in ("triton", "reference")
    )
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_windows_keep_their_ring():
    model = tiny_mistral().to(DEVICE)
    found, expected = (
        conversation(kvfx.compress(model, Full(), backend=backend, compile=False, verify=False))
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_op_names_its_backend():
    fast = kvfx.compress(tiny_llama(), Full(), backend="triton", compile=False, verify=False)
    text = fast.graph("decode").text
    for op in ("append_dense.triton(", "attend_dense.triton(", "live_rows.reference("):
        assert op in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_cannot_is_refused_by_site(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = r"layers\.0\.self_attn: kvfx\.store_dense\.triton cannot run: .*not on cpu"
    with pytest.raises(UnsupportedShape, match=message):
        kvfx.compress(tiny_llama(), Full(), backend="triton", compile=False, verify=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_is_the_reference_without_a_gpu():
    fast = kvfx.compress(tiny_llama(), Full(), compile=False, verify=False)
    assert ".triton(" not in fast.graph("decode").text


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["kivi window", "kvcrush", "kvmerger", "adakv"])
def test_it_compiles(policy, monkeypatch):
    """All programs, as for a GPU: on CPUs decode alone is worth it."""
    monkeypatch.setattr(kvfx.compiler, "_worth_compiling", lambda lowered: tuple(lowered.graphs))
    model = tiny_llama(head_dim=32).to(DEVICE)
    found, expected = (
        conversation(
            kvfx.compress(model, POLICIES[policy], backend="triton", compile=compile, verify=False)
        )
        for compile in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_replayed_steps_do_not_wait_for_the_device(policy):
    fast = kvfx.compress(tiny_llama(head_dim=32).to(DEVICE), POLICIES[policy], verify=False)
    past = fast.new_cache()
    inputs = {name: x.to(DEVICE) for name, x in left_padded((70, 40)).items()}
    token = fast(**inputs, past_key_values=past, logits_to_keep=1).logits.argmax(-1)
    for _ in range(3):
        token = fast(token, past_key_values=past).logits.argmax(-1)
    assert past.state.replayed is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            token = fast(token, past_key_values=past).logits.argmax(-1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
