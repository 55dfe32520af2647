"""The rope room: rotations add, leave lengths alone, and are those of transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfx.kernels.rope.reference import rotate

STYLES = ("half", "interleaved")


def frequencies(width: int) -> Tensor:
    return 10000.0 ** -(torch.arange(0, width, 2) / width)


@given(
    st.sampled_from(STYLES),
    st.sampled_from((2, 6, 16)),
    st.integers(-4000, 4000),
    st.integers(-9, 9),
)
def test_rotations_add(style, width, a, b):
    x = torch.randn(2, 3, 5, 16)
    shift = torch.zeros(2, 1, 5, dtype=torch.int64)
    f = frequencies(width)
    both = rotate(rotate(x, shift + a, f, style), shift + b, f, style)
    torch.testing.assert_close(both, rotate(x, shift + a + b, f, style), rtol=1e-4, atol=1e-5)
    back = rotate(rotate(x, shift + a, f, style), shift - a, f, style)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("width", [2, 10, 16])
def test_the_other_channels_pass(style, width):
    x = torch.randn(2, 4, 7, 16)
    out = rotate(x, torch.randint(0, 900, (2, 2, 7)), frequencies(width), style)
    assert torch.equal(out[..., width:], x[..., width:])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("style", STYLES)
def test_no_shift_changes_nothing(style):
    x = torch.randn(1, 2, 3, 8)
    assert torch.equal(rotate(x, torch.zeros(1, 2, 3).long(), frequencies(8), style), x)


@pytest.mark.parametrize("style", STYLES)
def test_a_pair_turns_by_its_angle(style):
    x = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    first, second = (1, 5) if style == "half" else (2, 3)
    x[..., first] = 1.0
    out = rotate(x, torch.tensor([[[3]]]), torch.tensor([1.0, 0.5, 0.2, 0.1]), style)[0, 0, 0]
    expected = torch.zeros(8, dtype=torch.float64)
    expected[first], expected[second] = torch.cos(torch.tensor(1.5)), torch.sin(torch.tensor(1.5))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("positions", [[0, 1, 2], [5, 300, 4097]], ids=str)
def test_half_is_what_transformers_does(positions):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16)
    at = torch.tensor([positions, positions])
    angle = at[..., None].float() * frequencies(16)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    shift = at[:, None].expand(-1, 2, -1)
    for x, turned in zip((q, k), expected, strict=True):
        torch.testing.assert_close(
            rotate(x, shift, frequencies(16), "half"), turned, rtol=1e-3, atol=2e-3
        )


def test_interleaved_is_what_transformers_does():
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

    q, at = torch.randn(2, 4, 3, 16), torch.tensor([[0, 9, 77], [1, 2, 3]])
    angle = (at[..., None].float() * frequencies(16)).repeat_interleave(2, -1)
    expected, _ = apply_rotary_pos_emb(q, q, angle.cos(), angle.sin())
    out = rotate(q, at[:, None].expand(-1, 2, -1), frequencies(16), "interleaved")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_rounded_once(dtype):
    x = torch.randn(2, 2, 5, 16).to(dtype)
    shift = torch.randint(0, 5000, (2, 2, 5))
    out = rotate(x, shift, frequencies(16), "half")
    assert out.dtype == dtype
    exact = rotate(x.float(), shift, frequencies(16), "half")
    assert torch.equal(out, exact.to(dtype))


def test_each_kv_head_has_its_own_shift():
    x, shift = torch.randn(1, 4, 3, 8), torch.tensor([[[0, 0, 0], [7, 8, 9]]])
    out = rotate(x, shift, frequencies(8), "half")
    assert torch.equal(out[:, :2], x[:, :2])
    expected = rotate(x[:, 2:], shift[:, 1:], frequencies(8), "half")
    assert torch.equal(out[:, 2:], expected)
