"""The KIVI room: quantizer, words, one history for every way of storing, attention from codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfx.geometry import Causal, Site
from kvfx.kernels.kivi import reference
from kvfx.kernels.kivi.layout import Entries, Planes
from kvfx.kernels.kivi.quantizer import (
    dequantize_keys,
    dequantize_values,
    quantize,
    quantize_keys,
    quantize_values,
)
from kvfx.policies.kivi import KIVI

CPU = torch.device("cpu")
BITS = st.sampled_from((2, 4, 8))
MODES = ("kivi", "window")


class Case(NamedTuple):
    """A policy at a site, and the batch of a test."""

    policy: KIVI
    kv_repeat: int = 1
    head_dim: int = 64
    value_dim: int = 64
    batch: int = 2
    kv_heads: int = 2

    @property
    def site(self) -> Site:
        """The site of the case."""
        heads = self.kv_heads * self.kv_repeat
        sizes = (heads, self.kv_heads, self.head_dim, self.value_dim)
        return Site(0, "layers.0", *sizes, 0.2, Causal(), None, torch.float32, CPU)

    @property
    def knobs(self) -> dict[str, Any]:
        """The keyword arguments of the ops."""
        return self.policy.attributes(self.site)

    def garbage(self, entries: int) -> list[Tensor]:
        """Empty buffers: random codes, NaN everywhere else but in the counters."""
        capacity = self.policy.capacity(entries, bounded=True)
        buffers = []
        for buffer in self.policy.buffers(self.site).values():
            x = buffer.allocate(self.batch, capacity, CPU)
            if x.dtype == torch.int16:
                x = torch.randint_like(x, -32768, 32767)
            buffers.append(x if buffer.counter or x.dtype == torch.int16 else x.fill_(float("nan")))
        return buffers

    def rows(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, and which are kept: rows and heads of different lengths."""
        shape = (self.batch, self.kv_heads, tokens)
        keep = torch.rand(shape) < torch.linspace(0.6, 1.0, self.batch)[:, None, None]
        return torch.randn(*shape, self.head_dim), torch.randn(*shape, self.value_dim), keep

    def stored(self, rows: tuple[Tensor, Tensor, Tensor], sizes: list[int]) -> list[Tensor]:
        """Buffers that hold `rows`, stored in chunks of `sizes`."""
        buffers = self.garbage(sum(sizes))
        for k, v, keep in zip(*(x.split(sizes, 2) for x in rows), strict=True):
            reference.store(k, v, keep, *buffers, **self.knobs)
        return buffers

    def grown(self, rows: tuple[Tensor, Tensor, Tensor], start: int = 0) -> list[Tensor]:
        """Buffers that hold `rows`, the first `start` stored, the others appended one by one."""
        tokens = rows[0].shape[2]
        buffers = self.garbage(tokens)
        if start:
            reference.store(*(x[:, :, :start] for x in rows), *buffers, **self.knobs)
        for at in range(start, tokens):
            reference.append(*(x[:, :, at : at + 1] for x in rows), *buffers, **self.knobs)
            reference.flush(*buffers, **self.knobs)
        return buffers


def small(mode: str, **knobs: int) -> KIVI:
    """A policy that flushes often."""
    return KIVI(group_size=32, residual=64, mode=mode, **knobs)


def attention(q: Tensor, k: Tensor, v: Tensor, live: Tensor, scale: float) -> Tensor:
    """The truth in fp64: every query row over the live entries."""
    q, k, v = q.double(), k.double(), v.double()
    q = q.unflatten(1, (k.shape[1], -1))
    score = torch.einsum("bkrsd,bktd->bkrst", q, k) * scale
    weight = score.masked_fill(~live[:, :, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bkrst,bktd->bkrsd", weight, v).flatten(1, 2)


@given(BITS, st.sampled_from((32, 64, 96, 128, 192, 256)), st.sampled_from((32, 64)))
def test_unpacked_words_are_the_codes(bits, width, tokens):
    planes = Planes(bits, width, tokens)
    codes = torch.randint(0, 2**bits, (2, tokens, width), dtype=torch.int32)
    words = planes.pack(codes)
    assert words.dtype == torch.int16
    assert words.numel() * 16 == codes.numel() * bits
    assert torch.equal(planes.unpack(words), codes)


def test_a_code_lies_where_the_layout_says():
    planes = Planes(bits=4, width=64, tokens=32)
    assert (planes.planes, planes.words, planes.parts, planes.rows) == (2, 32, 2, 16)
    codes = torch.zeros(32, 64, dtype=torch.int32)
    codes[16 + 3, 32 + 5] = 9
    words = planes.pack(codes)
    assert int(words[3, 5]) & 0xFFFF == 9 << planes.shift(part=1, plane=1)
    assert words.count_nonzero() == 1


@given(BITS, st.floats(-50, 50), st.floats(-8, 8), st.integers(0, 2**16))
def test_error_is_at_most_half_a_scale(bits, offset, exponent, seed):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * 2**exponent + offset
    codes, scale, zero = quantize(x, bits, dim=-1)
    error = (codes * scale.double() + zero.double() - x).abs()
    # one fp16 step at the bounds of the group
    step = 2**-10 * x.abs().amax(-1, keepdim=True) + 2**-24
    assert (error <= scale.double() / 2 * (1 + 1e-3) + step).all()
    for bound in (x.argmin(-1, keepdim=True), x.argmax(-1, keepdim=True)):
        assert (error.gather(-1, bound) <= step + scale.double() * 2**-11 * 2**bits).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_permuted_tokens_permute_codes_of_keys(bits):
    k, order = torch.randn(2, 32, 64), torch.randperm(32)
    codes, scale, zero = quantize_keys(k, bits)
    permuted = quantize_keys(k[:, order], bits)
    assert torch.equal(permuted[0], codes[:, order])
    assert torch.equal(permuted[1], scale)
    assert torch.equal(permuted[2], zero)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [-3, 4])
def test_a_power_of_two_scales_parameters_and_leaves_codes(bits, power):
    v = torch.randn(5, 96)
    codes, scale, zero = quantize_values(v, bits, 32)
    scaled = quantize_values(v * 2**power, bits, 32)
    assert torch.equal(scaled[0], codes)
    assert torch.equal(scaled[1], scale * 2**power)
    assert torch.equal(scaled[2], zero * 2**power)


@pytest.mark.parametrize("value", [0.0, -1.5, 60000.0])
def test_a_constant_group_is_exact(value):
    x = torch.full((32, 64), value)
    assert torch.equal(dequantize_keys(*quantize_keys(x, 2)), x)
    assert torch.equal(dequantize_values(*quantize_values(x, 2, 32)), x)


def test_groups_beyond_fp16_saturate():
    codes, scale, zero = quantize(torch.tensor([[-1e6, 1e6]]), 4, dim=-1)
    assert scale.isfinite().all()
    assert zero.item() == -65504.0
    assert codes.tolist() == [[0, 15]]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 100, 128, 193])
def test_store_quantizes_what_the_paper_quantizes(tokens):
    case = Case(small("kivi"), batch=1)
    k, v, keep = case.rows(tokens)
    has = Entries(*case.stored((k, v, keep.fill_(True)), [tokens]))
    assert (has.length == tokens).all()
    assert (has.k_quantized == tokens // 64 * 64).all()
    assert (has.v_quantized == max(0, tokens - 64)).all()


@pytest.mark.parametrize("tokens", [1, 95, 96, 97, 128, 193])
def test_store_keeps_one_window(tokens):
    case = Case(small("window"), batch=1)
    k, v, keep = case.rows(tokens)
    has = Entries(*case.stored((k, v, keep.fill_(True)), [tokens]))
    assert (has.k_quantized == max(0, tokens - 64) // 32 * 32).all()
    assert torch.equal(has.k_quantized, has.v_quantized)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("width", "k_bits", "v_bits"), [(64, 2, 2), (64, 8, 4), (96, 4, 8), (128, 4, 2)]
)
def test_every_history_stores_the_same(mode, width, k_bits, v_bits):
    policy = small(mode, k_bits=k_bits, v_bits=v_bits)
    case = Case(policy, head_dim=width, value_dim=width)
    rows = case.rows(229)
    whole = case.stored(rows, [229])
    for other in (
        case.stored(rows, [1, 99, 2, 127]),
        case.grown(rows),
        case.grown(rows, start=131),
    ):
        for a, b in zip(whole[-3:], other[-3:], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(
            reference.load(*whole, **case.knobs), reference.load(*other, **case.knobs), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_load_gives_back_what_was_kept(mode):
    case = Case(small(mode, bits=8))
    k, v, keep = case.rows(150)
    buffers = case.stored((k, v, keep), [150])
    has = Entries(*buffers)
    k_all, v_all, live = reference.load(*buffers, **case.knobs)
    assert torch.equal(live.sum(-1), keep.sum(-1))
    for b in range(case.batch):
        for h in range(case.kv_heads):
            for x, entries, coded in (
                (k, k_all, has.k_quantized[b, h]),
                (v, v_all, has.v_quantized[b, h]),
            ):
                kept, entry = x[b, h, keep[b, h]], entries[b, h, live[b, h]]
                assert torch.equal(entry[coded:], kept[coded:])
                assert (entry - kept).abs().max() < 0.02


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_due_stay_untouched(mode):
    case = Case(small(mode))
    tokens = 64 if mode == "kivi" else 96
    k, v, keep = case.rows(tokens)
    keep[:] = True
    keep[1, :, -1] = False
    buffers = case.garbage(tokens)
    for at in range(tokens):
        rows = (x[:, :, at : at + 1] for x in (k, v, keep))
        reference.append(*rows, *buffers, **case.knobs)
    before = [x.clone() for x in buffers]
    reference.flush(*buffers, **case.knobs)
    assert (Entries(*buffers).k_quantized[0] > 0).all()
    for old, new in zip(before, buffers, strict=True):
        assert torch.equal(old[1].view(torch.uint8), new[1].view(torch.uint8))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_kept_changes_nothing(mode):
    case = Case(small(mode))
    k, v, keep = case.rows(161)
    buffers = case.grown((k, v, keep))
    before = [x.clone() for x in buffers]
    row, none = torch.randn(2, 2, 1, 64), torch.zeros(2, 2, 1, dtype=torch.bool)
    reference.append(row, row, none, *buffers, **case.knobs)
    for old, new in zip(
        reference.load(*before, **case.knobs), reference.load(*buffers, **case.knobs), strict=True
    ):
        assert torch.equal(old, new)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kv_repeat", "width", "k_bits", "v_bits"),
    [(1, 64, 4, 4), (3, 96, 2, 8), (4, 128, 8, 2), (3, 64, 2, 4), (1, 128, 8, 8)],
)
def test_attend_and_extend_agree_with_dense_attention(mode, kv_repeat, width, k_bits, v_bits):
    policy = small(mode, k_bits=k_bits, v_bits=v_bits)
    case = Case(policy, kv_repeat=kv_repeat, head_dim=width, value_dim=width)
    buffers = case.stored(case.rows(173), [173])
    # beyond a flush, so that keys and values differ in what is exact
    k, v, _ = case.rows(1)
    keep = torch.ones(2, 2, 1, dtype=torch.bool)
    reference.append(k, v, keep, *buffers, **case.knobs)
    k_all, v_all, live = reference.load(*buffers, **case.knobs)
    q = torch.randn(2, 2 * kv_repeat, 1, width)
    truth = attention(q, k_all, v_all, live, 0.2)
    position = torch.zeros(2, 1, dtype=torch.long)
    out = reference.attend(q, position, *buffers, scale=0.2, **case.knobs)
    assert (out - truth).abs().max() < 2e-5

    position = torch.tensor([[-1, 500, 501], [500, 501, 502]])
    k, v, _ = case.rows(3)
    q = torch.randn(2, 2 * kv_repeat, 3, width)
    out = reference.extend(q, k, v, position, *buffers, scale=0.2, **case.knobs)
    own = (position >= 0)[:, None].expand(-1, 2, -1)
    for row in range(3):
        seen = torch.cat((live, own & (torch.arange(3) <= row)), -1)
        keys, values = torch.cat((k_all, k), 2), torch.cat((v_all, v), 2)
        truth = attention(q[:, :, row : row + 1], keys, values, seen, 0.2)
        # what a padding row computes is nobody's business
        asked = position[:, row] >= 0
        assert (out[:, :, row : row + 1] - truth)[asked].abs().max() < 2e-5


@pytest.mark.parametrize("mode", MODES)
def test_short_caches_are_exact(mode):
    case = Case(small(mode))
    k, v, keep = case.rows(40)
    keep[:] = True
    buffers = case.stored((k, v, keep), [40])
    q = torch.randn(2, 2, 1, 64)
    out = reference.attend(q, keep, *buffers, scale=0.2, **case.knobs)
    assert (out - attention(q, k, v, keep, 0.2)).abs().max() < 1e-5


def test_eight_bits_with_one_group_per_row_cost_little():
    case = Case(KIVI(bits=8, group_size=64, residual=64))
    k, v, keep = case.rows(300)
    keep[:] = True
    buffers = case.stored((k, v, keep), [300])
    q = torch.randn(2, 2, 1, 64)
    out = reference.attend(q, keep, *buffers, scale=64**-0.5, **case.knobs)
    assert (out - attention(q, k, v, keep, 64**-0.5)).abs().max() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_decode_equals_eager(mode):
    case = Case(small(mode, k_bits=8, v_bits=4))
    buffers = case.grown(case.rows(200))

    def step(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *buffers: Tensor) -> Tensor:
        reference.append(k, v, keep, *buffers, **case.knobs)
        return reference.attend(q, keep, *buffers, scale=0.2, **case.knobs)

    compiled = torch.compile(step, fullgraph=True)
    other = [x.clone() for x in buffers]
    for x in other[:6]:
        torch._dynamo.mark_dynamic(x, 2)
    for _ in range(2):
        k, v, keep = case.rows(1)
        q = torch.randn(2, 2, 1, 64)
        eager = step(q, k, v, keep, *buffers)
        assert (compiled(q, k, v, keep, *other) - eager).abs().max() < 2e-5
        for a, b in zip(
            reference.load(*buffers, **case.knobs),
            reference.load(*other, **case.knobs),
            strict=True,
        ):
            assert torch.equal(a, b)
