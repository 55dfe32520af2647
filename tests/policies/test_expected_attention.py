"""ExpectedAttention: queries as they were, rotated onwards. See test_matrix.py, test_scores.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import ExpectedAttention
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.testing.tiny import left_padded, tiny_gpt2, tiny_llama


def test_the_statistics_are_those_of_queries_before_rotation():
    """Hooked out of the model itself: projected hidden states, without sinks and padding."""
    llama = tiny_llama()
    fast = kvfx.compress(
        llama, ExpectedAttention(16, sinks=2, future=1), compile=False, verify=False
    )
    prompt, seen = left_padded((40, 23)), []
    hook = llama.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: seen.append(out.unflatten(-1, (4, 16)).transpose(1, 2))
    )
    llama(**prompt, use_cache=False)
    hook.remove()
    held = fast(**prompt).past_key_values.state.buffers[0]
    for row, tokens in enumerate((40, 23)):
        q = seen[0][row, :, 40 - tokens + 2 :]
        # a rotation by one position keeps lengths: R is orthogonal for a future of one
        torch.testing.assert_close(held["mean"][row].norm(dim=-1), q.mean(1).norm(dim=-1))
        spread = (q - q.mean(1, keepdim=True)).square().mean(1).sum(-1)
        trace = held["covariance"][row].diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(trace, spread, rtol=1e-4, atol=1e-4)


def test_it_goes_on_evicting_with_the_prompts_statistics():
    fast = kvfx.compress(
        tiny_llama(), ExpectedAttention(16, future=8, interval=4), compile=False, verify=False
    )
    past = fast.new_cache()
    fast(**left_padded((40,)), past_key_values=past)
    before = past.state.buffers[0]["mean"].clone()
    for _ in range(9):
        fast(torch.full((1, 1), 5), past_key_values=past)
    assert torch.equal(past.state.buffers[0]["mean"], before)
    assert int(past.state.buffers[0]["length"].max()) <= 20


def test_a_model_without_rotation_is_refused():
    with pytest.raises(UnsupportedShape, match="no rotary embedding was matched"):
        kvfx.compress(tiny_gpt2(), ExpectedAttention(), compile=False, verify=False)


@pytest.mark.parametrize("knobs", [{"sinks": -1}, {"future": 0}, {"epsilon": -1.0}], ids=str)
def test_a_wrong_knob_is_named(knobs):
    with pytest.raises(PolicyError, match="at least"):
        ExpectedAttention(**knobs)
