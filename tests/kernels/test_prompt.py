"""The prompt room: exact attention of a prompt over itself, padded or windowed, in blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfx.kernels.common.attention import BLOCK
from kvfx.kernels.prompt.reference import attend, attention
from kvfx.testing.numerics import assert_as_accurate_as

SCALE = 0.3


def truth(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Masked softmax in fp64; padding sees nothing and gives zeros."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    distance = positions[:, :, None] - positions[:, None]
    real = positions >= 0
    seen = (distance >= 0) & real[:, None] & real[:, :, None]
    if window is not None:
        seen &= distance < window
    score = torch.einsum("bhsd,bhtd->bhst", q.double(), k) * SCALE
    weight = score.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhst,bhtd->bhsd", weight, v)


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("rows", [5, 63])
def test_accuracy(rows, window, padding, repeat):
    q = torch.randn(2, 2 * repeat, rows, 16)
    k, v = torch.randn(2, 2, rows, 16), torch.randn(2, 2, rows, 12)
    positions = torch.arange(rows).expand(2, rows).clone()
    positions[1] = (positions[1] - padding).clamp(min=-1)
    out = attend(q, k, v, positions, scale=SCALE, window=window)
    expected = truth(q, k, v, positions, window)
    plain = truth(q, k, v, positions, window).float()
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert not out[1, :, :padding].any()
    assert plain.isfinite().all()


@pytest.mark.parametrize("rows", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("window", [None, 100, BLOCK])
def test_edges_of_blocks(rows, window):
    q, k, v = torch.randn(1, 2, rows, 8), torch.randn(1, 1, rows, 8), torch.randn(1, 1, rows, 8)
    positions = (torch.arange(rows)[None] - 2).clamp(min=-1)
    out = attend(q, k, v, positions, scale=SCALE, window=window)
    expected = truth(q, k, v, positions, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 2])
def test_low_precision(padding):
    q, k, v = (torch.randn(1, heads, 33, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    positions = (torch.arange(33)[None] - padding).clamp(min=-1)
    index = torch.arange(33)
    mask = (index[:, None] >= index) & (index >= padding)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True
    )
    plain[:, :, :padding] = 0
    out = attend(q, k, v, positions, scale=SCALE)
    assert_as_accurate_as(out, low_precision=plain, truth=truth(q, k, v, positions, None))


def test_padding_may_hold_anything_finite():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    positions = (torch.arange(9)[None] - 3).clamp(min=-1)
    before = attend(q, k, v, positions, scale=SCALE)
    k[:, :, :3], v[:, :, :3] = 1e4, -1e4
    assert torch.equal(attend(q, k, v, positions, scale=SCALE), before)


def test_the_mask_decides_until_it_is_proven():
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    index = torch.arange(7)
    mask = (index[:, None] >= index) & (index[:, None] - index < 3)
    positions = index.expand(2, 7)
    by_mask = attention(q, k, v, mask, None, scale=SCALE, kv_repeat=2)
    by_position = attention(q, k, v, None, positions, scale=SCALE, kv_repeat=2, window=3)
    torch.testing.assert_close(by_mask, by_position)
    causal = attention(q, k, v, None, None, scale=SCALE, kv_repeat=2)
    torch.testing.assert_close(
        causal, attention(q, k, v, None, positions, scale=SCALE, kv_repeat=2)
    )
    assert not torch.allclose(causal, by_mask)
