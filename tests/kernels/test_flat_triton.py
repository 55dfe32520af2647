"""The Triton kernels of the flat room: what the reference does, at awkward sizes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.flat import reference, triton
from kvfx.kernels.flat.layout import owners, spread
from kvfx.testing.numerics import assert_as_accurate_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
# around the tile of the interpreter, 16; the last row of the batch is full
LENGTHS = ((0, 1), (15, 16), (33, 0), (2, 64))
SLOTS = 66


def filled(
    lengths: tuple[tuple[int, ...], ...], slots: int, width: int, value_width: int, dtype
) -> list[Tensor]:
    """Random live entries, NaN in free slots."""
    start, length = spread(torch.tensor(lengths, device=DEVICE), slots)
    live = owners(start, length, slots)[2][..., None]
    out = [
        torch.randn(len(lengths), slots, size, device=DEVICE)
        .masked_fill(~live, float("nan"))
        .to(dtype)
        for size in (width, value_width)
    ]
    return [*out, start.int(), length.int()]


def rules(names: str, heads: int, slots: int = SLOTS) -> dict:
    """The optional operands and attributes that a test names."""
    batch = len(LENGTHS)
    choices = {
        "position": torch.arange(slots, device=DEVICE).mul(2).expand(batch, -1).int(),
        "bias": torch.rand(batch, slots, device=DEVICE),
        "slopes": torch.rand(heads, device=DEVICE) * 0.1,
        "sinks": torch.randn(heads, device=DEVICE),
        "softcap": 2.0,
        "window": 21,
        "chunk": 16,
    }
    return {name: choices[name] for name in names.split()}


RULES = ("softcap", "sinks", "bias", "slopes", "window", "chunk", "position window")
ALL = "position bias slopes sinks softcap window"


def truth(function, *operands, **extra) -> Tensor:
    """The reference in fp64."""

    def wide(x):
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    with mock.patch.object(Tensor, "float", lambda x: x.double()):
        found = function(*map(wide, operands), **{name: wide(x) for name, x in extra.items()})
    return found.double().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", ["", ALL], ids=["plain", "all rules"])
@pytest.mark.parametrize(
    ("kv_heads", "repeat", "width", "value_width"),
    [(1, 3, 16, 16), (2, 1, 80, 48), (2, 17, 32, 64)],
    ids=str,
)
def test_one_row(kv_heads, repeat, width, value_width, names, dtype, poison):
    lengths = tuple(row[:kv_heads] for row in LENGTHS)
    buffers = filled(lengths, SLOTS, width, value_width, dtype)
    heads = kv_heads * repeat
    q = torch.randn(len(lengths), heads, 1, width, device=DEVICE).to(dtype)
    positions = buffers[3].amax(1, keepdim=True).long() * 2
    extra = rules(names, heads)
    out = triton.attend(q, positions, *buffers, scale=SCALE, **extra)
    assert out.shape == (len(lengths), heads, 1, value_width)
    low = reference.attend(q, positions, *buffers, scale=SCALE, **extra)
    expected = truth(reference.attend, q, positions, *buffers, scale=SCALE, **extra)
    assert_as_accurate_as(out, low_precision=low, truth=expected)


@pytest.mark.parametrize("names", RULES)
def test_each_rule(names, poison):
    buffers = filled(LENGTHS, SLOTS, 32, 32, torch.float32)
    q, positions = torch.randn(len(LENGTHS), 4, 1, 32, device=DEVICE), buffers[3].amax(1)[:, None]
    positions = positions.long() + 3
    extra = rules(names, 4)
    out = triton.attend(q, positions, *buffers, scale=SCALE, **extra)
    low = reference.attend(q, positions, *buffers, scale=SCALE, **extra)
    expected = truth(reference.attend, q, positions, *buffers, scale=SCALE, **extra)
    assert_as_accurate_as(out, low_precision=low, truth=expected)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_any_number_of_parts(parts, monkeypatch, poison):
    """Short heads leave parts empty."""
    monkeypatch.setattr(
        triton.attend_entries.__globals__["launch"], "parts", lambda *_, **__: parts
    )
    buffers = filled(LENGTHS, SLOTS, 32, 32, torch.float32)
    q, positions = (
        torch.randn(len(LENGTHS), 4, 1, 32, device=DEVICE),
        torch.full((len(LENGTHS), 1), 99, device=DEVICE),
    )
    out = triton.attend(q, positions, *buffers, scale=SCALE)
    torch.testing.assert_close(out, reference.attend(q, positions, *buffers, scale=SCALE))


@pytest.mark.parametrize(
    ("repeat", "names", "decay"),
    [(1, "", 1.0), (3, "", 0.25), (3, ALL, 0.0), (70, "", 1.0)],
    ids=str,
)
def test_weights_accumulate(repeat, names, decay, poison):
    buffers = filled(LENGTHS, SLOTS, 32, 16, torch.float32)
    found, expected = (torch.zeros(len(LENGTHS), SLOTS, device=DEVICE) for _ in range(2))
    extra = rules(names, 2 * repeat)
    for step in range(2):
        q = torch.randn(len(LENGTHS), 2 * repeat, 1, 32, device=DEVICE)
        position = torch.full((len(LENGTHS), 1), 70 + step, device=DEVICE)
        given = {"scale": SCALE, "decay": decay, **extra}
        out = triton.attend_scored(q, position, found, *buffers, **given)
        low = reference.attend_scored(q, position, expected, *buffers, **given)
        torch.testing.assert_close(out, low)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("rows", "names"),
    [(1, ""), (5, "softcap sinks"), (5, "slopes chunk"), (5, ALL), (23, "")],
    ids=str,
)
def test_several_rows(rows, names, poison):
    buffers = filled(LENGTHS, SLOTS, 40, 24, torch.float32)
    batch = len(LENGTHS)
    q = torch.randn(batch, 6, rows, 40, device=DEVICE)
    k, v = (torch.randn(batch, 2, rows, size, device=DEVICE) for size in (40, 24))
    positions = buffers[3].amax(1)[:, None].long() * 2 + torch.arange(rows, device=DEVICE)
    # padding on the left: seen by nobody, and it sees nothing
    positions[1, : rows // 2] = -1
    extra = rules(names, 6)
    out = triton.extend(q, k, v, positions, *buffers, scale=SCALE, **extra)
    low = reference.extend(q, k, v, positions, *buffers, scale=SCALE, **extra)
    expected = truth(reference.extend, q, k, v, positions, *buffers, scale=SCALE, **extra)
    assert_as_accurate_as(out, low_precision=low, truth=expected)
    assert out.transpose(1, 2).is_contiguous()
    assert bool((out[1, :, : rows // 2] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_stored_behind_the_live_ones(dtype, poison):
    found = filled(((3, 0, 9), (7, 20, 0), (0, 0, 0)), 61, 20, 12, dtype)
    expected = [x.clone() for x in found]
    for rows in (11, 1):
        # strided rows, as a projection gives them
        k, v = (
            torch.randn(3, rows, 3, size, device=DEVICE).to(dtype).transpose(1, 2)
            for size in (20, 12)
        )
        keep = torch.rand(3, 3, rows, device=DEVICE) < 0.5
        keep[0, 0] = False
        triton.store(k, v, keep, *found)
        reference.store(k, v, keep, *expected)
        assert_same(found, expected)


def test_no_slot_is_left(poison):
    found = filled(((3, 0), (0, 4)), 9, 20, 12, torch.float32)
    expected = [x.clone() for x in found]
    k, v = (torch.randn(2, 2, 6, size, device=DEVICE) for size in (20, 12))
    keep = torch.tensor(
        [[[1] * 6, [0] * 6], [[0, 1] * 3, [1, 0, 0, 0, 0, 1]]], device=DEVICE
    ).bool()
    for room, buffers in ((triton, found), (reference, expected)):
        room.store(k, v, keep, *buffers)
        # nobody has room: a kept row goes nowhere, not into the neighbour
        room.append(k[:, :, :1], v[:, :, :1], keep[:, :, 1:2], *buffers)
    assert found[3].sum(1).tolist() == [9, 9]
    assert_same(found, expected)


def test_one_row_is_appended_where_it_is_kept():
    found = filled(((3, 0, 2), (7, 12, 0)), 32, 20, 12, torch.float32)
    expected = [x.clone() for x in found]
    k, v = (torch.randn(2, 1, 3, size, device=DEVICE).transpose(1, 2) for size in (20, 12))
    keep = torch.tensor([[True, False, True], [True, True, True]], device=DEVICE)[..., None]
    triton.append(k, v, keep, *found)
    reference.append(k, v, keep, *expected)
    assert found[3].tolist() == [[4, 0, 3], [8, 13, 1]]
    assert_same(found, expected)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal layouts and equal live entries."""
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(reference.load(*found), reference.load(*expected), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_served_is_refused():
    q = torch.zeros(1, 1, 1, 1024, device=DEVICE)
    counters = [torch.ones(1, 1, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    position = torch.zeros(1, 1, device=DEVICE).long()
    with pytest.raises(UnsupportedShape, match=r"attend_flat: .* 1024 channels of torch\.float32"):
        triton.attend(q, position, q[:, 0], q[:, 0], *counters, scale=1.0)


def test_long_buffers_are_no_wide_keys():
    """Scores have as many numbers as there are slots: they are not what is attended to."""
    k, counters = torch.zeros(1, 4096, 16, device=DEVICE), [torch.ones(1, 1).int().to(DEVICE)] * 2
    given = (k[:, :1, None], torch.zeros(1, 1), torch.zeros(1, 4096), k, k, *counters)
    assert triton.constraint("attend_scored", *given, scale=1.0) is None
