"""The Triton kernels of the dense room: what the reference does, at awkward sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfx.kernels.dense import reference, triton
from kvfx.testing.numerics import assert_as_accurate_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
# around the tile of the interpreter, 16
LENGTHS = ((0, 1), (15, 16), (17, 33), (64, 5))


def buffers(length: Tensor, capacity: int, width: int, value_width: int, dtype) -> list[Tensor]:
    """Random live entries, NaN behind them."""
    out = []
    for size in (width, value_width):
        x = torch.randn(*length.shape, capacity, size, device=DEVICE)
        dead = torch.arange(capacity, device=DEVICE) >= length[..., None]
        out.append(x.masked_fill(dead[..., None], float("nan")).to(dtype))
    return [*out, length.to(torch.int32)]


def rules(names: str, batch: int, heads: int, kv_heads: int, capacity: int) -> dict:
    """The optional operands and attributes that a test names."""
    choices = {
        "position": torch.arange(capacity, device=DEVICE).mul(2).expand(batch, kv_heads, -1).int(),
        "bias": torch.rand(batch, kv_heads, capacity, device=DEVICE),
        "slopes": torch.rand(heads, device=DEVICE) * 0.1,
        "sinks": torch.randn(heads, device=DEVICE),
        "softcap": 2.0,
        "window": 21,
        "chunk": 16,
    }
    return {name: choices[name] for name in names.split()}


RULES = (
    "",
    "softcap",
    "sinks",
    "bias",
    "slopes",
    "window",
    "chunk",
    "position window",
    "chunk slopes",
)
ALL = "position bias slopes sinks softcap window"


def truth(function, q: Tensor, *rest, **extra) -> Tensor:
    """The reference in fp64, on zeros for what is dead."""
    wide = [x.nan_to_num(0.0).double() if x.is_floating_point() else x for x in (q, *rest)]
    extra = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in extra.items()
    }
    with reference_in_double():
        return function(*wide, **extra).double().cpu()


def reference_in_double():
    """Within it, `Tensor.float` keeps fp64: the reference computes the truth."""
    from unittest import mock

    return mock.patch.object(torch.Tensor, "float", lambda x: x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", ["", ALL], ids=["plain", "all rules"])
@pytest.mark.parametrize(
    ("kv_heads", "repeat", "width", "value_width"),
    [(1, 1, 16, 16), (2, 3, 80, 48), (2, 17, 32, 64), (1, 70, 64, 64)],
    ids=str,
)
def test_one_row(kv_heads, repeat, width, value_width, names, dtype):
    length = torch.tensor(LENGTHS, device=DEVICE)[:, :kv_heads]
    cache = buffers(length, 65, width, value_width, dtype)
    heads = kv_heads * repeat
    q = torch.randn(4, heads, 1, width, device=DEVICE).to(dtype)
    positions = length.amax(1, keepdim=True) * 2
    extra = rules(names, 4, heads, kv_heads, 65)
    out = triton.attend(q, positions, *cache, scale=SCALE, **extra)
    assert out.shape == (4, heads, 1, value_width)
    expected = truth(reference.attend, q, positions, *cache, scale=SCALE, **extra)
    live = [x.nan_to_num(0.0) for x in cache]
    low = reference.attend(q, positions, *live, scale=SCALE, **extra)
    # no entry, no weight: the reference of plain attention divides zero by zero there
    low, expected = low.nan_to_num(0.0), expected.nan_to_num(0.0)
    assert_as_accurate_as(out, low_precision=low, truth=expected)


@pytest.mark.parametrize("names", RULES)
def test_each_rule(names):
    length = torch.tensor(LENGTHS[1:], device=DEVICE)
    cache = buffers(length, 65, 32, 32, torch.float32)
    q = torch.randn(3, 4, 1, 32, device=DEVICE)
    positions = length.amax(1, keepdim=True) + 3
    extra = rules(names, 3, 4, 2, 65)
    out = triton.attend(q, positions, *cache, scale=SCALE, **extra)
    live = [x.nan_to_num(0.0) for x in cache]
    low = reference.attend(q, positions, *live, scale=SCALE, **extra)
    expected = truth(reference.attend, q, positions, *cache, scale=SCALE, **extra)
    assert_as_accurate_as(out, low_precision=low, truth=expected)


@pytest.mark.parametrize("decay", [1.0, 0.25, 0.0])
def test_weights_accumulate(decay):
    length = torch.tensor(LENGTHS, device=DEVICE)
    cache = buffers(length, 65, 32, 32, torch.float32)
    live = [x.nan_to_num(0.0) for x in cache]
    found, expected = (torch.zeros(4, 2, 65, device=DEVICE) for _ in range(2))
    for step in range(2):
        q = torch.randn(4, 6, 1, 32, device=DEVICE)
        position = torch.full((4, 1), 70 + step, device=DEVICE)
        out = triton.attend_scored(q, position, found, *cache, scale=SCALE, decay=decay)
        low = reference.attend_scored(q, position, expected, *live, scale=SCALE, decay=decay)
        torch.testing.assert_close(out, low)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), (length > 0) * 3.0 * (1.0 + decay))


@pytest.mark.parametrize("names", ["", "softcap sinks", "window", "slopes chunk", ALL])
@pytest.mark.parametrize("rows", [1, 5, 33], ids="{} rows".format)
def test_several_rows(rows, names):
    length = torch.tensor(LENGTHS, device=DEVICE)
    cache = buffers(length, 65, 40, 24, torch.float32)
    q = torch.randn(4, 6, rows, 40, device=DEVICE)
    k, v = (torch.randn(4, 2, rows, size, device=DEVICE) for size in (40, 24))
    start = length.amax(1, keepdim=True) * 2
    positions = start + torch.arange(rows, device=DEVICE)
    # padding on the left: seen by nobody, and it sees nothing
    positions[1, : rows // 2] = -1
    extra = rules(names, 4, 6, 2, 65)
    out = triton.extend(q, k, v, positions, *cache, scale=SCALE, **extra)
    live = [x.nan_to_num(0.0) for x in cache]
    low = reference.extend(q, k, v, positions, *live, scale=SCALE, **extra)
    expected = truth(reference.extend, q, k, v, positions, *cache, scale=SCALE, **extra)
    assert_as_accurate_as(out, low_precision=low, truth=expected)
    assert out.transpose(1, 2).is_contiguous()
    assert bool((out[1, :, : rows // 2] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_stored_behind_the_live_ones(dtype):
    length = torch.tensor([[3, 0], [7, 20]], device=DEVICE)
    k, v = (torch.randn(2, 2, 37, size, device=DEVICE).to(dtype) for size in (20, 12))
    keep = torch.rand(2, 2, 37, device=DEVICE) < 0.6
    keep[0, 0] = False
    found, expected = (buffers(length, 64, 20, 12, dtype) for _ in range(2))
    for old, new in zip(expected, found, strict=True):
        new.copy_(old)
    triton.store(k, v, keep, *found)
    reference.store(k, v, keep, *expected)
    assert_same(found, expected)


def test_one_row_is_appended_where_it_is_kept():
    length = torch.tensor([[3, 0], [7, 20]], device=DEVICE)
    # strided rows, as a projection gives them
    k, v = (torch.randn(2, 1, 2, size, device=DEVICE).transpose(1, 2) for size in (20, 12))
    keep = torch.tensor([[True, False], [True, True]], device=DEVICE)[..., None]
    found, expected = (buffers(length, 32, 20, 12, torch.float32) for _ in range(2))
    for old, new in zip(expected, found, strict=True):
        new.copy_(old)
    triton.append(k, v, keep, *found)
    reference.append(k, v, keep, *expected)
    assert_same(found, expected)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal lengths and equal live entries."""
    assert torch.equal(found[2], expected[2])
    live = torch.arange(found[0].shape[2], device=DEVICE) < found[2][..., None]
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(a[live], b[live])


def test_what_cannot_be_served_is_refused():
    from kvfx.errors import UnsupportedShape

    q = torch.zeros(1, 1, 1, 1024, dtype=torch.float32, device=DEVICE)
    cache = [q, q, torch.ones(1, 1, dtype=torch.int32, device=DEVICE)]
    with pytest.raises(UnsupportedShape, match=r"1024 channels of torch\.float32"):
        triton.attend(q, torch.zeros(1, 1, device=DEVICE).long(), *cache, scale=1.0)
