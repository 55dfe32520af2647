"""The dense room: attention over live entries only, and one history for every way of storing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfx.kernels.dense import reference
from kvfx.testing.numerics import assert_as_accurate_as
from kvfx.testing.poison import poison_beyond

SCALE = 0.3


def truth(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Masked softmax in fp64: seen [B, K or 1, S, T]; a row that sees nothing gives zeros."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    seen = seen.expand(-1, k.shape[1] // repeat, -1, -1).repeat_interleave(repeat, 1)
    score = torch.einsum("bhsd,bhtd->bhst", q.double(), k) * SCALE
    weight = score.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhst,bhtd->bhsd", weight, v)


def empty(batch: int, kv_heads: int, capacity: int, width: int, value_width: int) -> list[Tensor]:
    """Buffers without live entries, full of NaN."""
    nan = float("nan")
    return [
        torch.full((batch, kv_heads, capacity, width), nan),
        torch.full((batch, kv_heads, capacity, value_width), nan),
        torch.zeros(batch, kv_heads, dtype=torch.int32),
    ]


def filled(length: Tensor, capacity: int, width: int, value_width: int) -> list[Tensor]:
    """Random live entries, NaN behind them."""
    k = torch.randn(*length.shape, capacity, width)
    v = torch.randn(*length.shape, capacity, value_width)
    # softmax weights of dead entries are zero, and zero times NaN is NaN: only keys are poisoned
    return [poison_beyond(k, length), v, length.to(torch.int32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "repeat", "capacity", "width", "value_width"),
    [(1, 1, 1, 8, 8), (2, 3, 63, 20, 12), (3, 4, 100, 16, 16), (2, 2, 65, 64, 48)],
    ids=str,
)
def test_one_row_attends_what_is_live(kv_heads, repeat, capacity, width, value_width, dtype):
    length = torch.randint(1, capacity + 1, (2, kv_heads))
    length[0, 0] = capacity
    buffers = [
        x.to(dtype) if x.is_floating_point() else x
        for x in filled(length, capacity, width, value_width)
    ]
    q = torch.randn(2, kv_heads * repeat, 1, width, dtype=dtype)
    live = (torch.arange(capacity) < length[..., None])[:, :, None]
    out = reference.attend(q, torch.tensor([[5], [6]]), *buffers, scale=SCALE)
    assert out.dtype == dtype
    k, v = buffers[0].masked_fill(~live.transpose(2, 3), 0), buffers[1]
    plain = torch.nn.functional.scaled_dot_product_attention(
        q,
        k.repeat_interleave(repeat, 1),
        v.repeat_interleave(repeat, 1),
        attn_mask=live.repeat_interleave(repeat, 1),
        scale=SCALE,
    )
    expected = truth(q, k, v, live)
    assert_as_accurate_as(out, low_precision=plain, truth=expected)


def test_attention_ignores_what_lies_beyond_live():
    length = torch.tensor([[3, 7]])
    buffers = filled(length, 9, 8, 8)
    q = torch.randn(1, 2, 1, 8)
    before = reference.attend(q, torch.tensor([[9]]), *buffers, scale=SCALE)
    for x in buffers[:2]:
        x[:, 0, 3:] = 1e4
        x[:, 1, 7:] = -1e4
    after = reference.attend(q, torch.tensor([[9]]), *buffers, scale=SCALE)
    assert torch.equal(before, after)


def test_capacity_does_not_matter():
    length = torch.tensor([[5, 2], [1, 4]])
    small = filled(length, 5, 8, 8)
    large = [torch.nn.functional.pad(x, (0, 0, 0, 59), value=3.0) for x in small[:2]] + small[2:]
    q = torch.randn(2, 4, 1, 8)
    results = [
        reference.attend(q, torch.zeros(2, 1).long(), *buffers, scale=SCALE)
        for buffers in (small[:2] + small[2:], large)
    ]
    torch.testing.assert_close(*results)


def test_rows_of_the_batch_are_independent():
    length = torch.tensor([[5, 2], [1, 4], [3, 3]])
    buffers, order = filled(length, 7, 8, 8), torch.tensor([2, 0, 1])
    q, positions = torch.randn(3, 4, 1, 8), torch.tensor([[5], [4], [3]])
    out = reference.attend(q, positions, *buffers, scale=SCALE)
    permuted = [x[order] for x in buffers]
    assert torch.equal(
        reference.attend(q[order], positions[order], *permuted, scale=SCALE), out[order]
    )


@pytest.mark.parametrize("repeat", [1, 2, 3, 4])
@pytest.mark.parametrize(("past", "rows"), [(0, 1), (0, 13), (7, 5), (63, 65)], ids=str)
def test_rows_attend_the_past_and_themselves(repeat, past, rows):
    kv_heads, width = 2, 8
    length = torch.tensor([[past, max(past - 3, 0)], [past // 2, 0]])
    buffers = filled(length, past + 4, width, width)
    buffers[0].nan_to_num_(1e3)
    q = torch.randn(2, kv_heads * repeat, rows, width)
    k, v = torch.randn(2, kv_heads, rows, width), torch.randn(2, kv_heads, rows, width)
    positions = past + torch.arange(rows).expand(2, rows).clone()
    padding = min(3, rows - 1)
    positions[1, :padding] = -1
    out = reference.extend(q, k, v, positions, *buffers, scale=SCALE)
    index = torch.arange(rows)
    own = (index[:, None] >= index) & (positions >= 0)[:, None] & (positions >= 0)[:, :, None]
    live = torch.arange(past + 4) < length[..., None]
    live = live[:, :, None] & (positions >= 0)[:, None, :, None]
    seen = torch.cat((live, own[:, None].expand(-1, kv_heads, -1, -1)), -1)
    keys, values = torch.cat((buffers[0], k), 2), torch.cat((buffers[1], v), 2)
    torch.testing.assert_close(out.double(), truth(q, keys, values, seen), rtol=1e-4, atol=1e-5)
    # a padding row sees nothing
    assert not out[1, :, :padding].any()
    # laid out as the output projection wants it
    assert out.transpose(1, 2).is_contiguous()


def test_extend_mutates_nothing():
    buffers = filled(torch.tensor([[3, 2]]), 8, 4, 4)
    copies = [x.clone() for x in buffers]
    x = torch.randn(1, 2, 3, 4)
    reference.extend(x, x, x, torch.tensor([[3, 4, 5]]), *buffers, scale=SCALE)
    for a, b in zip(buffers, copies, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**16))
def test_history(sizes, seed):
    """Stored at once, in chunks, or one by one: the same entries in the same order."""
    generator = torch.Generator().manual_seed(seed)
    tokens, shape = sum(sizes), (2, 2, sum(sizes))
    k, v = torch.randn(*shape, 4, generator=generator), torch.randn(*shape, 6, generator=generator)
    keep = torch.rand(shape, generator=generator) < 0.7
    results = []
    for chunks in ([tokens], sizes):
        buffers = empty(2, 2, tokens, 4, 6)
        for part in zip(*(x.split(chunks, 2) for x in (k, v, keep)), strict=True):
            reference.store(*part, *buffers)
        results.append(buffers)
    buffers = empty(2, 2, tokens + 1, 4, 6)
    for at in range(tokens):
        reference.append(*(x[:, :, at : at + 1] for x in (k, v, keep)), *buffers)
    results.append(buffers)
    for found in results:
        assert torch.equal(found[2], keep.sum(-1).to(torch.int32))
        for b in range(2):
            for h in range(2):
                count = int(found[2][b, h])
                assert torch.equal(found[0][b, h, :count], k[b, h][keep[b, h]])
                assert torch.equal(found[1][b, h, :count], v[b, h][keep[b, h]])


def test_prefill_is_decode_is_any_chunking():
    rows, q = 9, torch.randn(2, 4, 9, 8)
    k, v = torch.randn(2, 2, rows, 8), torch.randn(2, 2, rows, 8)
    positions, keep = torch.arange(rows).expand(2, rows), torch.ones(2, 2, rows, dtype=torch.bool)
    index = torch.arange(rows)
    expected = truth(q, k, v, (index[:, None] >= index).expand(2, 1, rows, rows))
    for sizes in ([9], [4, 5], [1] * 9, [2, 6, 1]):
        buffers, out, start = empty(2, 2, 16, 8, 8), [], 0
        buffers[1].zero_()
        for size in sizes:
            here = slice(start, start + size)
            part = (k[:, :, here], v[:, :, here])
            if size == 1:
                reference.append(*part, keep[:, :, here], *buffers)
                out.append(
                    reference.attend(q[:, :, here], positions[:, here], *buffers, scale=SCALE)
                )
            else:
                buffers[0].nan_to_num_(0.0)
                out.append(
                    reference.extend(
                        q[:, :, here], *part, positions[:, here], *buffers, scale=SCALE
                    )
                )
                reference.store(*part, keep[:, :, here], *buffers)
            start += size
        torch.testing.assert_close(torch.cat(out, 2).double(), expected, rtol=1e-4, atol=1e-5)


def test_load_gives_copies():
    buffers = filled(torch.tensor([[3, 0]]), 5, 4, 4)
    k, v, live = reference.load(*buffers)
    assert live.tolist() == [[[True] * 3 + [False] * 2, [False] * 5]]
    k.zero_(), v.zero_()
    assert buffers[0][0, 0, :3].all()
    assert buffers[1].all()


def test_a_row_that_is_not_kept_stays_beyond_live():
    buffers = empty(1, 2, 4, 4, 4)
    x = torch.randn(1, 2, 1, 4)
    reference.append(x, x, torch.tensor([[[True], [False]]]), *buffers)
    assert buffers[2].tolist() == [[1, 0]]


def test_garbage_beyond_live_may_be_nan():
    buffers = empty(1, 2, 9, 8, 8)
    k, v, q = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 4, 3, 8)
    reference.store(k, v, torch.ones(1, 2, 3, dtype=torch.bool), *buffers)
    positions = torch.tensor([[3, 4, 5]])
    attended = reference.attend(q[:, :, :1], positions[:, :1], *buffers, scale=SCALE)
    live = torch.ones(1, 2, 1, 3, dtype=torch.bool)
    torch.testing.assert_close(
        attended.double(), truth(q[:, :, :1], k, v, live), rtol=1e-4, atol=1e-5
    )
    assert reference.extend(q, k, v, positions, *buffers, scale=SCALE).isfinite().all()
