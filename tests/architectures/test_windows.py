"""Sliding windows and chunks: what is held, in bytes, and prompts of three windows."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx.errors import InputError
from kvfx.mask_proof import SHORTEST
from kvfx.testing.architectures import tiny_architecture
from kvfx.testing.tiny import VOCAB, tiny

MODELS = {
    "mistral": (lambda: tiny("mistral", {"sliding_window": 16}), 16),
    "longer than the probe": (
        lambda: tiny("mistral", {"sliding_window": SHORTEST + 40}),
        SHORTEST + 40,
    ),
    "gemma2, capped": (lambda: tiny("gemma2", {"sliding_window": 16}), 16),
    "gpt_oss, sinks": (lambda: tiny("gpt_oss", {"sliding_window": 16}), 16),
    "gpt_neo, written out": (lambda: tiny_architecture("gpt_neo"), 16),
    "llama4, chunks": (lambda: tiny_architecture("llama4_text"), 16),
}


@pytest.mark.parametrize(("build", "size"), MODELS.values(), ids=MODELS)
def test_a_windowed_layer_holds_its_window(build, size):
    """Three windows of prompt, and a window of decoded tokens, leave as many entries as can be
    seen; logits are those of the model.
    """
    model = build()
    fast = kvfx.compress(model, "full", compile=False)
    ids = torch.randint(3, VOCAB, (2, 4 * size), generator=torch.Generator().manual_seed(0))
    out = fast(ids[:, : 3 * size])
    for at in range(3 * size, 4 * size):
        out = fast(ids[:, at : at + 1], past_key_values=out.past_key_values)
    expected = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(out.logits, expected, rtol=1e-3, atol=1e-3)
    windowed = 0
    for plan, buffers in zip(fast.plan.sites, out.past_key_values.state.buffers, strict=True):
        site = plan.site
        if (site.window or site.chunk) is None:
            continue
        windowed += 1
        # K, V, int32 positions, an int32 counter
        row = site.kv_heads * (site.head_dim + site.value_dim) * 4 + 4
        held = sum(buffer.untyped_storage().nbytes() for buffer in buffers.values())
        assert held == 2 * (size * row + 4)
    assert windowed


def test_chunks_are_counted_from_the_first_token():
    """Where positions begin elsewhere, transformers counts chunks from the first token all the
    same: such positions are refused.
    """
    model = tiny_architecture("llama4_text")
    fast = kvfx.compress(model, "full", compile=False)
    ids = torch.randint(3, VOCAB, (1, 20))
    with pytest.raises(InputError, match="counts chunks from its first token"):
        fast(ids, position_ids=torch.arange(5, 25)[None])
