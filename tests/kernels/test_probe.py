"""The probe room: each statistic against the whole matrix of weights, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.kivi import quantizer
from kvfx.kernels.probe import reference
from kvfx.kernels.scores.reference import columns

SCALE, ROWS, STEPS, GROUP, RANK = 0.3, 7, 16, 8, 5
FRACTIONS, BITS = (0.25, 0.5, 1.0), (8, 2)
NAMES = (
    "retention",
    "window_retention",
    "head_retention",
    "entropy",
    "variance",
    "key_entropy",
    "eviction_error",
    "quantization_error",
)
# kv_heads, repeat, tokens, head_dim: full and ragged groups of tokens and of channels
SHAPES = [(1, 1, 8, 8), (3, 1, 31, 16), (2, 3, 64, 12), (1, 4, 100, 20)]


def prompt(kv_heads: int, repeat: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, kv_heads * repeat, tokens, width)
    return q, torch.randn(2, kv_heads, tokens, width), torch.randn(2, kv_heads, tokens, width)


def probed(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    live = torch.ones(k.shape[:3], dtype=torch.bool)
    found = reference.probe(
        q, k, v, columns(q, k, live, scale=SCALE), scale=SCALE, rows=ROWS, steps=STEPS,
        fractions=FRACTIONS, bits=BITS, group_size=GROUP, rank=RANK,
    )  # fmt: skip
    return dict(zip(NAMES, found, strict=True))


def weights(q: Tensor, k: Tensor) -> Tensor:
    """The whole causal matrix [B, H, T, T] in fp64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = q.double() @ k.double().mT * SCALE
    causal = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
    return score.masked_fill(~causal, float("-inf")).softmax(-1)


def best(score: list[float], tokens: int) -> float:
    return sum(sorted(score, reverse=True)[:tokens])


def curve(score: Tensor) -> Tensor:
    """Retention of score [T], one point at a time."""
    numbers = score.tolist()
    tokens = [math.ceil(g * len(numbers) / STEPS) for g in range(1, STEPS + 1)]
    return torch.tensor([best(numbers, n) / sum(numbers) for n in tokens], dtype=torch.float64)


def relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within what fp32 weights allow; the truth is fp64."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_retention(shape):
    q, k, v = prompt(*shape)
    found, weight = probed(q, k, v), weights(q, k)
    for row in range(2):
        received = weight[row].sum(1)
        per_kv_head = received.unflatten(0, (shape[0], -1)).sum(1)
        assert_near(found["retention"][row], curve(received.mean(0)))
        assert_near(found["window_retention"][row], curve(weight[row, :, -ROWS:].sum(1).mean(0)))
        for head in range(shape[0]):
            assert_near(found["head_retention"][row, head], curve(per_kv_head[head]))
    for name in NAMES[:3]:
        assert found[name].dtype == torch.float64
        assert bool((found[name].diff(dim=-1) >= 0).all())
        assert bool((found[name][..., -1] == 1.0).all())


def test_retention_counts_whole_tokens():
    score = torch.tensor([0.0, 5.0, 1.0, 4.0, 0.0])
    found = reference.retention(score, 4)
    # 1.25, 2.5, 3.75 and 5 tokens, rounded up
    assert found.tolist() == [0.9, 1.0, 1.0, 1.0]
    assert reference.retention(torch.ones(5), 4).tolist() == [2 / 5, 3 / 5, 4 / 5, 1.0]
    assert reference.retention(torch.ones(3), 6).tolist() == [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1.0, 1.0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropy_and_variance(shape):
    q, k, v = prompt(*shape)
    found, past = probed(q, k, v), shape[2] - ROWS
    given = weights(q, k)[:, :, -ROWS:, :past]
    assert_near(found["entropy"], -(given * given.log()).sum(-1).mean((1, 2)))
    apart = (given - given.mean(2, keepdim=True)).square().sum(2) / (ROWS - 1)
    assert_near(found["variance"], apart.sum(-1).mean(1))


def test_entropy_of_even_attention():
    """Rows that look at all tokens alike: the share of the past, spread evenly."""
    k = v = torch.randn(1, 1, 40, 8)
    found = probed(torch.zeros(1, 1, 40, 8), k, v)
    rows = [(33 / n) * math.log(n) for n in range(34, 41)]
    assert_near(found["entropy"], torch.tensor([sum(rows) / 7]))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_key_entropy(shape):
    q, k, v = prompt(*shape)
    found, expected = probed(q, k, v)["key_entropy"], []
    for keys in k.double():
        entropies = []
        for x in keys:
            unit = x - x.mean(0)
            unit = unit / unit.norm(dim=1, keepdim=True)
            values = torch.linalg.svdvals(unit) ** 2 / len(x)
            kept = (values / values.sum())[:RANK]
            entropies.append(float(-(kept * kept.log()).sum()) / math.log(x.shape[1]))
        expected.append(sum(entropies) / len(entropies))
    assert_near(found, torch.tensor(expected))


def test_key_entropy_of_one_direction_is_none():
    x = torch.outer(torch.linspace(-1.0, 2.0, 50), torch.randn(16))
    assert float(reference.matrix_entropy(x, 32)) == pytest.approx(0.0, abs=1e-6)
    # nothing but the mean: a covariance of zeros
    assert float(reference.matrix_entropy(torch.ones(50, 16), 32)) == 0.0
    # every direction alike: 16 of 16 eigenvalues are the whole entropy, 8 of them half
    unit = torch.cat((torch.eye(16), -torch.eye(16)))
    assert float(reference.matrix_entropy(unit, 32)) == pytest.approx(1.0)
    assert float(reference.matrix_entropy(unit, 8)) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eviction_error(shape):
    q, k, v = prompt(*shape)
    found, past = probed(q, k, v)["eviction_error"], shape[2] - ROWS
    weight, repeat = weights(q, k), shape[1]
    values = v.double().repeat_interleave(repeat, 1)
    out = (weight @ values)[:, :, -ROWS:]
    received = weight.sum(2).unflatten(1, (shape[0], -1)).sum(2)[..., :past]
    for index, fraction in enumerate(FRACTIONS):
        seen = torch.ones_like(weight, dtype=torch.bool)
        least = received.sort(-1).values[..., past - math.ceil(fraction * past)]
        seen[..., :past] = (received >= least[..., None]).repeat_interleave(repeat, 1)[:, :, None]
        kept = weight * seen
        kept = (kept / kept.sum(-1, keepdim=True))[:, :, -ROWS:]
        assert_near(found[:, index], relative(kept @ values, out))
    assert bool((found[:, -1] == 0.0).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantization_error(shape):
    q, k, v = prompt(*shape)
    found, full = probed(q, k, v)["quantization_error"], (shape[2] - ROWS) // GROUP * GROUP
    values = v.repeat_interleave(shape[1], 1).double()
    out = (weights(q, k) @ values)[:, :, -ROWS:]
    pairs = [(k_bits, v_bits) for k_bits in BITS for v_bits in BITS]
    for index, (k_bits, v_bits) in enumerate(pairs):
        rough_k, rough_v = k.clone(), v.clone()
        for start in range(0, full, GROUP):
            tile = slice(start, start + GROUP)
            codes = quantizer.quantize_keys(k[:, :, tile], k_bits)
            rough_k[:, :, tile] = quantizer.dequantize_keys(*codes)
        for start in range(0, shape[3], GROUP):
            part = slice(start, start + GROUP)
            codes = quantizer.quantize(v[:, :, :full, part], v_bits, -1)
            rough_v[:, :, :full, part] = quantizer.dequantize(*codes)
        rough = weights(q, rough_k) @ rough_v.repeat_interleave(shape[1], 1).double()
        assert_near(found[:, index], relative(rough[:, :, -ROWS:], out))
    if full:
        assert bool((found[:, 0] < found[:, 3]).all())
    else:
        assert bool((found == 0.0).all())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_quantizer_is_that_of_kivi(bits):
    x = torch.randn(3, 2, 32, 20) * torch.logspace(-4, 4, 20)
    x[0, 0, :, 0] = 3.3
    x[0, 0, 0, 1] = 1e6
    for dim in (2, 3):
        expected = quantizer.dequantize(*quantizer.quantize(x, bits, dim))
        assert torch.equal(reference.quantized(x, bits, dim), expected)


def test_similarity():
    before = torch.randn(2, 9, 16)
    after = before + torch.randn(2, 9, 16)
    cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
    torch.testing.assert_close(reference.similarity(before, after), cosine.mean(1))
    assert_near(reference.similarity(before, 2 * before), torch.ones(2))
    assert reference.similarity(before.bfloat16(), after.bfloat16()).dtype == torch.float32


def test_half_precision_is_measured_in_fp32():
    q, k, v = (x.bfloat16() for x in prompt(2, 2, 40, 16))
    found, expected = probed(q, k, v), probed(q.float(), k.float(), v.float())
    for name in NAMES:
        assert torch.equal(found[name], expected[name]), name


def test_a_prompt_that_only_asks_is_refused():
    with pytest.raises(UnsupportedShape, match="7 tokens are no more than the 7 that ask"):
        probed(*prompt(1, 1, ROWS, 8))
