"""The compact room: kept entries move to the front, and turn by as much as they move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.compact import reference
from kvfx.kernels.compact import triton as kernels
from kvfx.testing.numerics import assert_as_accurate_as
from kvfx.testing.poison import poison_beyond

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STYLES = ("half", "interleaved")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROOMS = {"reference": reference, "triton": kernels}
# the interpreter moves 32 entries at a time
LENGTHS = [[0, 1, 31], [32, 33, 100]]


def frequencies(width: int) -> Tensor:
    return (10000.0 ** -(torch.arange(0, width, 2) / width)).to(DEVICE)


def cache(dtype: torch.dtype, width: int, value_width: int, capacity: int = 100) -> list[Tensor]:
    """Random live entries and NaN behind them, for two rows and three heads: k, v, length."""
    length = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE).clamp(max=capacity)
    k = torch.randn(2, 3, capacity, width, device=DEVICE).to(dtype)
    v = torch.randn(2, 3, capacity, value_width, device=DEVICE).to(dtype)
    return [poison_beyond(k, length), poison_beyond(v, length), length]


def turned(x: Tensor, delta: Tensor, radians: Tensor, style: str) -> Tensor:
    """Rows x [N, D] turned by delta [N] positions, pair by pair, in fp64."""
    out = x.double().clone()
    for pair, frequency in enumerate(radians.double()):
        a, b = (pair, pair + len(radians)) if style == "half" else (2 * pair, 2 * pair + 1)
        angle = delta.double() * frequency
        out[:, a] = x[:, a].double() * angle.cos() - x[:, b].double() * angle.sin()
        out[:, b] = x[:, b].double() * angle.cos() + x[:, a].double() * angle.sin()
    return out


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("width", [16, 20, 80])
@pytest.mark.parametrize("room", ROOMS)
def test_kept_entries_move_to_the_front(room, width, share, poison):
    k, v, length = cache(torch.bfloat16, width, 48)
    keep = torch.rand(2, 3, 100, device=DEVICE) < share
    before = [x.clone() for x in (k, v, length)]
    ROOMS[room].compact(keep, None, k, v, length, style="half")
    for b in range(2):
        for h in range(3):
            live = int(before[2][b, h])
            kept = keep[b, h, :live].nonzero().flatten()
            assert length[b, h] == len(kept)
            assert torch.equal(k[b, h, : len(kept)], before[0][b, h, kept])
            assert torch.equal(v[b, h, : len(kept)], before[1][b, h, kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "rotated"), [(16, 16), (20, 12), (80, 80)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_keys_turn_by_how_far_they_move(style, width, rotated, dtype, poison):
    buffers, keep = cache(dtype, width, 16), torch.rand(2, 3, 100, device=DEVICE) < 0.5
    found = []
    for room in ROOMS.values():
        k, v, length = (x.clone() for x in buffers)
        room.compact(keep, frequencies(rotated), k, v, length, style=style)
        found.append((k, v, length))
    assert torch.equal(found[0][2], found[1][2])
    for b in range(2):
        for h in range(3):
            kept = keep[b, h, : int(buffers[2][b, h])].nonzero().flatten()
            delta = torch.arange(len(kept), device=DEVICE) - kept
            expected = turned(buffers[0][b, h, kept], delta, frequencies(rotated), style)
            by_reference, out = (x[0][b, h, : len(kept)] for x in found)
            assert_as_accurate_as(out, low_precision=by_reference, truth=expected)
            assert torch.equal(out[:, rotated:], buffers[0][b, h, kept, rotated:])
            assert torch.equal(found[1][1][b, h, : len(kept)], buffers[1][b, h, kept])
            stay = delta == 0
            assert torch.equal(out[stay], buffers[0][b, h, kept][stay])


@pytest.mark.parametrize("style", STYLES)
def test_far_moves_are_exact(style, monkeypatch):
    """100,000 positions are 16,000 turns: an fp32 angle is off by 4e-3 there, ours by nothing."""
    monkeypatch.setattr(kernels, "config", lambda arch: kernels.Config(16384, 64, 1))
    entries = 100_100
    k = torch.randn(1, 1, entries, 8, device=DEVICE)
    length = torch.tensor([[entries]], dtype=torch.int32, device=DEVICE)
    keep = torch.arange(entries, device=DEVICE)[None, None] >= 100_000
    radians = torch.tensor([1.0, 3.0, 0.1, 1e-4], device=DEVICE)
    expected = turned(k[0, 0, 100_000:], torch.full((100,), -100_000), radians, style)
    kernels.compact(keep, radians, k, k[..., :0].clone(), length, style=style)
    out = k[0, 0, :100].double()
    assert length.tolist() == [[100]]
    # five roundings: angle, cosine, sine, two products and their sum, of numbers up to |a| + |b|
    bound = 5 * torch.finfo(torch.float32).eps * 2 * float(expected.abs().max())
    assert float((out - expected).abs().max()) <= bound


@pytest.mark.parametrize("frequency", [0.0, 1.0, 3.14159274, 6.2831853, 7.0, 1e-7], ids=str)
def test_turns_wrap(frequency):
    """A frequency's turns are the same angle, whole turns dropped."""
    radians = torch.tensor([frequency])
    low, high = kernels.turns(radians)[0].tolist()
    turn = (high * 2**32 + low % 2**32) / 2.0**64
    off = turn * 6.283185307179586 - float(radians.double()[0])
    assert abs(turn) <= 0.5
    assert abs(off / 6.283185307179586 - round(off / 6.283185307179586)) <= 1e-15


@pytest.mark.parametrize("room", ROOMS)
def test_compacting_again_changes_nothing(room):
    k, v, length = cache(torch.float32, 16, 16)
    live = torch.arange(100, device=DEVICE) < length[..., None]
    before = [x.clone() for x in (k, v, length)]
    # True beyond the live entries does not count
    ROOMS[room].compact(torch.ones_like(live), frequencies(16), k, v, length, style="half")
    assert torch.equal(length, before[2])
    for x, y in zip((k, v), before, strict=False):
        assert torch.equal(x[live], y[live])


@pytest.mark.parametrize("room", ROOMS)
def test_steps_are_one_move(room):
    """Two evictions leave what one of both leaves: rotations add."""
    first = torch.rand(2, 3, 100, device=DEVICE) < 0.7
    k, v, length = cache(torch.float32, 16, 16)
    whole = [x.clone() for x in (k, v, length)]
    second = torch.rand(2, 3, 100, device=DEVICE) < 0.7
    compact = ROOMS[room].compact
    compact(first, frequencies(16), k, v, length, style="half")
    compact(second, frequencies(16), k, v, length, style="half")
    both = torch.zeros_like(first)
    for b in range(2):
        for h in range(3):
            kept = first[b, h, : int(whole[2][b, h])].nonzero().flatten()
            both[b, h, kept[second[b, h, : len(kept)]]] = True
    compact(both, frequencies(16), *whole, style="half")
    assert torch.equal(length, whole[2])
    live = torch.arange(100, device=DEVICE) < length[..., None]
    torch.testing.assert_close(k[live], whole[0][live], rtol=1e-4, atol=1e-5)
    assert torch.equal(v[live], whole[1][live])


def test_strided_caches():
    """Buffers laid out [B, C, K, D] and keep [B, 1, C], expanded."""
    k, v, length = cache(torch.float32, 16, 16)
    keep = (torch.rand(2, 1, 100, device=DEVICE) < 0.5).expand(-1, 3, -1)
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    same = length.clone()
    reference.compact(keep, None, k, v, length, style="half")
    kernels.compact(keep, None, *other, same, style="half")
    live = torch.arange(100, device=DEVICE) < length[..., None]
    assert torch.equal(same, length)
    assert all(torch.equal(x[live], y[live]) for x, y in zip((k, v), other, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"style": "both"}, "style is one of half, interleaved, not 'both'"),
        ({"pairs": 9}, "9 pairs do not fit into head_dim 16"),
        ({"dtype": torch.float64}, "caches are fp32, fp16 or bf16, not torch.float64"),
    ],
    ids=["style", "pairs", "dtype"],
)
def test_refusals(change, reason):
    k = torch.zeros(1, 1, 4, 16, dtype=change.get("dtype", torch.float32), device=DEVICE)
    length = torch.ones(1, 1, dtype=torch.int32, device=DEVICE)
    radians = torch.ones(change.get("pairs", 8), device=DEVICE)
    with pytest.raises(UnsupportedShape, match=reason):
        kernels.compact(
            k[..., 0] == 0, radians, k, k.clone(), length, style=change.get("style", "half")
        )


@pytest.mark.gpu
@pytest.mark.parametrize("style", STYLES)
def test_long_caches(style):
    k = torch.randn(2, 8, 32768, 128, device=DEVICE, dtype=torch.bfloat16)
    keep = torch.rand(2, 8, 32768, device=DEVICE) < 0.3
    length = torch.full((2, 8), 32768, dtype=torch.int32, device=DEVICE)
    by_reference = [k.clone(), k.clone(), length.clone()]
    by_kernel = [k.clone(), k.clone(), length.clone()]
    reference.compact(keep, frequencies(128), *by_reference, style=style)
    kernels.compact(keep, frequencies(128), *by_kernel, style=style)
    assert torch.equal(by_reference[2], by_kernel[2])
    live = torch.arange(32768, device=DEVICE) < by_kernel[2][..., None]
    assert torch.equal(by_reference[1][live], by_kernel[1][live])
    near = (by_reference[0][live].float() - by_kernel[0][live].float()).abs()
    # a key is rounded to bf16, of an angle that the reference knows to 2e-3 there
    assert float(near.max()) <= 0.01 * float(k.float().abs().max())
