"""The ring room: a window's newest rows, whatever way they came and however small the ring is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kvfx.cache import Buffer

SCALE = 0.4


@pytest.fixture(params=["reference", "triton"])
def room(request) -> Iterator[ModuleType]:
    """Each implementation; tensors are made where it runs."""
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        yield importlib.import_module(f"kvfx.kernels.ring.{request.param}")


def empty(batch: int, kv_heads: int, capacity: int, width: int = 8) -> list[Tensor]:
    shape = (batch, kv_heads, capacity, width)
    # a weight of zero times NaN is NaN: values are large instead
    return [
        torch.full(shape, float("nan")),
        torch.full(shape, 1e4),
        torch.full((batch, capacity), -1, dtype=torch.int32),
        torch.zeros(batch, 1, dtype=torch.int32),
    ]


def truth(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    """Windowed attention in fp64 from all rows at once; padding gives zeros."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    distance = positions[:, :, None] - positions[:, None]
    seen = (distance >= 0) & (distance < window) & (positions >= 0)[:, None]
    seen &= (positions >= 0)[:, :, None]
    score = torch.einsum("bhsd,bhtd->bhst", q.double(), k) * SCALE
    weight = score.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhst,bhtd->bhsd", weight, v)


def played(
    room: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    window: int,
    capacity: int,
    sizes: list[int],
) -> Tensor:
    """The rows in pieces: one row is appended and attends, several attend and are stored."""
    buffers, out, start = empty(k.shape[0], k.shape[1], capacity), [], 0
    for size in sizes:
        here = slice(start, start + size)
        rows, at = (k[:, :, here], v[:, :, here]), positions[:, here]
        if size == 1:
            room.append(*rows, at, *buffers, window=window)
            out.append(room.attend(q[:, :, here], at, *buffers, scale=SCALE, window=window))
        else:
            safe = [buffers[0].nan_to_num(1e3), *buffers[1:]]
            out.append(room.extend(q[:, :, here], *rows, at, *safe, scale=SCALE, window=window))
            room.store(*rows, at, *buffers, window=window)
        start += size
    return torch.cat(out, 2)


@pytest.mark.parametrize("repeat", [1, 2, 4])
@pytest.mark.parametrize(
    ("window", "sizes"),
    [
        (8, [29]),
        (8, [1] * 29),
        (8, [5, 1, 1, 9, 1, 12]),
        (8, [8, 1, 8, 7, 1]),
        (1, [4, 1, 1, 3]),
        (7, [3, 20, 1, 1]),
        (40, [13, 1, 2]),
    ],
    ids=str,
)
def test_any_history_is_windowed_attention(room, window, sizes, repeat):
    rows = sum(sizes)
    q = torch.randn(2, 2 * repeat, rows, 8)
    k, v = torch.randn(2, 2, rows, 8), torch.randn(2, 2, rows, 8)
    positions = torch.arange(rows).expand(2, rows).clone()
    if sizes[0] > 2:
        # the second row of the batch is padded
        positions[1] -= 2
        positions[1, :2] = -1
    out = played(room, q, k, v, positions, window, min(window, rows), sizes)
    expected = truth(q, k, v, positions, window)
    real = (positions >= 0)[:, None, :, None]
    torch.testing.assert_close(out.double() * real, expected, rtol=1e-4, atol=1e-5)


def test_a_ring_below_the_window_grows_before_it_wraps(room):
    """Entries keep their slots while nothing wrapped, so a larger copy continues the history."""
    window, k, v = 12, torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    q, positions = torch.randn(1, 2, 30, 8), torch.arange(30)[None]
    buffers = empty(1, 2, 5)
    room.store(k[:, :, :5], v[:, :, :5], positions[:, :5], *buffers, window=window)
    fills = (float("nan"), 1e4, -1)
    shapes = ((1, 2, 12, 8), (1, 2, 12, 8), (1, 12))
    grown = [
        Buffer(shape, x.dtype, fill=0 if fill != -1 else -1).resize(x, 1, 12)
        for x, shape, fill in zip(buffers[:3], shapes, fills, strict=True)
    ]
    buffers = [*grown, buffers[3]]
    out = []
    for at in range(5, 30):
        here = slice(at, at + 1)
        room.append(k[:, :, here], v[:, :, here], positions[:, here], *buffers, window=window)
        out.append(
            room.attend(q[:, :, here], positions[:, here], *buffers, scale=SCALE, window=window)
        )
    expected = truth(q, k, v, positions, window)[:, :, 5:]
    torch.testing.assert_close(torch.cat(out, 2).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[31], [10, 21], [1] * 31, [4, 4, 23]], ids=str)
def test_the_t_th_row_lives_in_slot_t_modulo_capacity(room, sizes):
    k = torch.arange(31.0).expand(1, 2, 31)[..., None].expand(-1, -1, -1, 8)
    positions, buffers = torch.arange(31)[None], empty(1, 2, 8)
    for rows, at in zip(k.split(sizes, 2), positions.split(sizes, 1), strict=True):
        write = room.append if rows.shape[2] == 1 else room.store
        write(rows, rows, at, *buffers, window=8)
    slots = [24, 25, 26, 27, 28, 29, 30, 23]
    assert buffers[2].tolist() == [slots]
    assert buffers[0][0, 1, :, 3].tolist() == slots
    assert buffers[3].tolist() == [[31]]


def test_padding_is_never_stored_nor_counted(room):
    positions = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])
    x, buffers = torch.randn(2, 1, 5, 8), empty(2, 1, 4)
    room.store(x, x, positions, *buffers, window=4)
    assert buffers[2].tolist() == [[0, 1, 2, -1], [4, 1, 2, 3]]
    assert buffers[3].tolist() == [[3], [5]]
    room.append(x[:, :, :1], x[:, :, :1], torch.tensor([[-1], [5]]), *buffers, window=4)
    assert buffers[3].tolist() == [[3], [6]]


def test_rows_of_the_batch_are_independent(room):
    x, order = torch.randn(3, 2, 11, 8), torch.tensor([1, 2, 0])
    positions = torch.stack([torch.arange(11) - shift for shift in (0, 2, 5)]).clamp(min=-1)
    sizes = [6, 1, 4]
    out = played(room, x, x, x, positions, 5, 5, sizes)
    permuted = played(room, x[order], x[order], x[order], positions[order], 5, 5, sizes)
    real = (positions >= 0)[:, None, :, None]
    torch.testing.assert_close((out * real)[order], permuted * real[order])
