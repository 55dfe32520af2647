"""The scores room: attention that rows receive, against the whole matrix in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.common.accumulate import accumulate
from kvfx.kernels.scores import reference
from kvfx.kernels.scores import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
# kv_heads, repeat, rows, head_dim: the interpreter holds 16 and reads 32 rows at a time
SHAPES = [(1, 1, 1, 16), (2, 3, 31, 16), (1, 4, 33, 80), (2, 1, 64, 20), (1, 2, 100, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def prompt(kv_heads: int, repeat: int, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries and keys as a projection lays them out, three rows of the batch padded on the left.

    The padding is NaN: nobody may read it.
    """
    q = torch.randn(3, rows, kv_heads * repeat, width, device=DEVICE).transpose(1, 2).to(dtype)
    k = torch.randn(3, rows, kv_heads, width, device=DEVICE).transpose(1, 2).to(dtype)
    padding = torch.tensor([0, rows // 2, rows], device=DEVICE)
    live = torch.arange(rows, device=DEVICE) >= padding[:, None]
    for x in (q, k):
        x.masked_fill_(~live[:, None, :, None], float("nan"))
    return [q, k, live[:, None].expand(-1, kv_heads, -1)]


def truth(q: Tensor, k: Tensor, live: Tensor, first: int = 0) -> Tensor:
    """The whole matrix of weights in fp64, summed over rows from `first` on and grouped heads."""
    rows = q.shape[2]
    q, k = (x.double().nan_to_num(0.0) for x in (q, k))
    score = torch.einsum("bkmsd,bktd->bkmst", q.unflatten(1, (k.shape[1], -1)) * SCALE, k)
    causal = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
    seen = live[:, :, None, None] & live[:, :, None, :, None] & causal
    weight = score.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weight[:, :, :, first:].sum((2, 3))


def assert_near(out: Tensor, expected: Tensor, q: Tensor, k: Tensor) -> None:
    """Pass when rounding to fp32 explains the difference.

    A partial sum of a logit is at most L = sum |q k|, in base 2; logit and log-sum-exp are known to
    L eps, a weight to as much, relatively; a sum of n positive terms to n eps / 2.
    """
    assert out.dtype == torch.float32
    q, k = (x.double().nan_to_num(0.0).abs() for x in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logit = float(torch.einsum("bhsd,bhtd->bhst", q, k).max()) * SCALE * kernels.LOG2E
    terms = q.shape[2] * q.shape[1]
    bound = (2.0 * logit + terms / 2) * torch.finfo(torch.float32).eps * expected
    # written so that NaN fails; weights below 2^-126 are flushed
    wrong = ~((out.double() - expected).abs() <= bound + 1e-30)
    assert not wrong.any(), f"{out[wrong]} instead of {expected[wrong]} at {wrong.nonzero()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns(shape, dtype, poison):
    q, k, live = prompt(*shape, dtype)
    expected = truth(q, k, live)
    for room in (reference, kernels):
        assert_near(room.columns(q, k, live, scale=SCALE), expected, q, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [(SHAPES[1], 16), (SHAPES[1], 200), (SHAPES[2], 1), (SHAPES[2], 32), (SHAPES[3], 5)],
    ids=str,
)
def test_window(shape, size, dtype, poison):
    q, k, live = prompt(*shape, dtype)
    expected = truth(q, k, live, max(0, shape[2] - size)) / shape[1]
    for room in (reference, kernels):
        assert_near(room.window(q, k, live, scale=SCALE, window=size), expected, q, k)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_change_nothing(parts, monkeypatch, poison):
    """More parts than tiles, too: a part without keys has a log-sum-exp of -inf."""
    monkeypatch.setattr(kernels.launch, "parts", lambda *_, **__: parts)
    q, k, live = prompt(1, 2, 70, 16, torch.float32)
    expected = truth(q, k, live)
    assert_near(kernels.columns(q, k, live, scale=SCALE), expected, q, k)


@pytest.mark.parametrize("size", [3, 70])
def test_holes(size, poison):
    """Rows that are not live may lie anywhere, and differ between heads; nobody reads them."""
    q, k = torch.randn(2, 4, 70, 16, device=DEVICE), torch.randn(2, 2, 70, 16, device=DEVICE)
    live = torch.rand(2, 2, 70, device=DEVICE) < 0.6
    live[0, 0, -1] = False
    k = k.masked_fill(~live[..., None], float("nan"))
    q = q.masked_fill(~live.repeat_interleave(2, 1)[..., None], float("nan"))
    expected = truth(q, k, live, 70 - size) / 2
    for room in (reference, kernels):
        assert_near(room.window(q, k, live, scale=SCALE, window=size), expected, q, k)


@pytest.mark.parametrize("factor", [30.0, -30.0], ids=str)
def test_sharp_weights(factor, poison):
    """Logits of hundreds: their exponentials overflow unless the largest is taken out."""
    q, k, live = prompt(1, 2, 50, 16, torch.float32)
    q = q * factor
    expected = truth(q, k, live)
    for room in (reference, kernels):
        assert_near(room.columns(q, k, live, scale=SCALE), expected, q, k)


def test_rows_give_one_each():
    """A row's weights sum to one, whatever it sees."""
    q, k, live = prompt(2, 3, 45, 16, torch.float32)
    for room in (reference, kernels):
        given = room.columns(q, k, live, scale=SCALE).sum(-1)
        torch.testing.assert_close(given, 3.0 * live.sum(-1), rtol=1e-5, atol=0.0)


def test_a_decode_row_continues_the_columns():
    """Column sums of a prompt, plus its next row, are the column sums of the longer prompt."""
    q, k = torch.randn(1, 4, 34, 16, device=DEVICE), torch.randn(1, 2, 34, 16, device=DEVICE)
    live = torch.ones(1, 2, 34, dtype=torch.bool, device=DEVICE)
    length = torch.full((1, 2), 34, dtype=torch.int32, device=DEVICE)
    logits = torch.einsum("bhd,bhtd->bht", q[:, :, -1], k.repeat_interleave(2, 1)) * SCALE
    lse = logits.logsumexp(-1)
    for room in (reference, kernels):
        score = torch.zeros(1, 2, 34, device=DEVICE)
        score[..., :33] = room.columns(q[:, :, :33], k[:, :, :33], live[..., :33], scale=SCALE)
        accumulate(logits * kernels.LOG2E, lse * kernels.LOG2E, length, score)
        whole = room.columns(q, k, live, scale=SCALE)
        torch.testing.assert_close(score, whole, rtol=1e-4, atol=1e-5)


def test_average_divides_by_the_rows_that_saw_a_token():
    q, k, live = prompt(2, 1, 21, 16, torch.float32)
    received = reference.columns(q, k, live, scale=SCALE)
    found = reference.average(received, live, None)
    for row, padding in enumerate((0, 10, 21)):
        saw = torch.arange(21 - padding, 0, -1, device=DEVICE)
        torch.testing.assert_close(found[row, :, padding:], received[row, :, padding:] / saw)
        assert not found[row, :, :padding].any()


def test_average_by_position():
    """What was evicted saw its successors, too; beyond the live length is garbage."""
    nan = float("nan")
    score = torch.tensor([[[8.0, 6.0, 3.0, nan], [nan, nan, nan, nan]]], device=DEVICE)
    live = torch.tensor([[[True, True, True, False], [False] * 4]], device=DEVICE)
    position = torch.tensor([[[1, 3, 8, 99], [7, 7, 7, 7]]], dtype=torch.int32, device=DEVICE)
    found = reference.average(score, live, position)
    assert found.tolist() == [[[1.0, 1.0, 3.0, 0.0], [0.0] * 4]]


STYLES = ("half", "interleaved")
FREQUENCIES = torch.tensor([1.0, 0.4, 0.03], device=DEVICE)
FUTURE = 5


def turned(x: Tensor, position: Tensor, style: str) -> Tensor:
    """x [..., D] turned by positions that its axes broadcast with, pair by pair, in fp64."""
    out = x.double().clone()
    for pair, frequency in enumerate(FREQUENCIES.double()):
        a, b = (pair, pair + 3) if style == "half" else (2 * pair, 2 * pair + 1)
        cos, sin = (position * frequency).cos(), (position * frequency).sin()
        out[..., a] = x[..., a].double() * cos - x[..., b].double() * sin
        out[..., b] = x[..., b].double() * cos + x[..., a].double() * sin
    return out


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sinks", [0, 4, 100])
def test_query_statistics(style, sinks):
    """Against mean and covariance of turned samples; the last two channels are not rotated."""
    plain = torch.randn(3, 4, 30, 8, device=DEVICE) + 1.0
    padding = torch.tensor([[0], [7], [30]], device=DEVICE)
    position = (torch.arange(30, device=DEVICE) - padding).clamp(min=-1)
    q = turned(plain, position[:, None], style).float()
    q = q.masked_fill((position < 0)[:, None, :, None], float("nan"))
    mean, covariance = reference.query_statistics(
        q, position, FREQUENCIES, style=style, sinks=sinks, future=FUTURE
    )
    for row in range(2):
        real = position[row] >= 0
        rows = plain[row, :, position[row] >= sinks] if sinks < 30 else plain[row, :, real]
        ahead = torch.arange(FUTURE, device=DEVICE) + position[row].max() + 1
        unit = torch.eye(8, dtype=torch.float64, device=DEVICE).expand(FUTURE, -1, -1)
        turn = turned(unit, ahead[:, None], style).mean(0)
        apart = rows.double() - rows.double().mean(1, keepdim=True)
        spread = apart.mT @ apart / rows.shape[1]
        near = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(mean[row], rows.double().mean(1) @ turn, **near)
        torch.testing.assert_close(covariance[row], turn.mT @ spread @ turn, **near)
    assert mean.dtype == covariance.dtype == torch.float32
    # a row of nothing but padding asks nothing
    assert not mean[2].any()
    assert not covariance[2].any()


@pytest.mark.parametrize("style", STYLES)
def test_expected_attention_of_one_query_is_its_softmax(style):
    """Without spread, and for the next position only: the weights that the mean query gives."""
    plain, k = torch.randn(2, 4, 1, 8, device=DEVICE), torch.randn(2, 2, 19, 8, device=DEVICE)
    position = torch.full((2, 19), -1, device=DEVICE)
    position[0], position[1, 3:] = torch.arange(19), torch.arange(16)
    live = (position >= 0)[:, None].expand(-1, 2, -1)
    # all queries are alike before they are turned
    q = turned(plain.expand(-1, -1, 19, -1), position[:, None], style).float()
    keys = turned(k, position[:, None], style).float().masked_fill(~live[..., None], float("nan"))
    mean, covariance = reference.query_statistics(
        q, position, FREQUENCIES, style=style, sinks=4, future=1
    )
    knobs = {"scale": SCALE, "epsilon": 0.25}
    score = reference.expected(
        mean, covariance, keys, keys, live, **knobs, spread=False, value_norm=False
    )
    new = turned(plain, position.amax(1)[:, None, None] + 1, style)[:, :, 0]
    logits = torch.einsum(
        "bkmd,bktd->bkmt", new.unflatten(1, (2, 2)), turned(k, position[:, None], style)
    )
    logits = (logits * SCALE).masked_fill(~live[:, :, None], float("-inf"))
    expected = logits.softmax(-1).mean(2).float()
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-6)
    # the covariance of equal queries is nothing but rounding
    spread = reference.expected(
        mean, covariance, keys, keys, live, **knobs, spread=True, value_norm=True
    )
    length = keys.norm(dim=-1).nan_to_num(0.0)
    torch.testing.assert_close(spread, (expected + 0.25) * length, rtol=1e-4, atol=1e-6)


def test_expected_attention_of_normal_queries():
    """Against the mean exponential of a million samples: E[exp(q . k)] in closed form."""
    torch.manual_seed(0)
    samples, k = 1_000_000, torch.randn(1, 1, 7, 4, device=DEVICE)
    root, mean = torch.randn(2, 4, 4, device=DEVICE) / 2, torch.randn(2, 4, device=DEVICE)
    q = mean[:, None] + torch.randn(2, samples, 4, device=DEVICE) @ root.mT
    weight = torch.einsum("msd,td->mst", q, k[0, 0]).mul(SCALE).exp().double().mean(1)
    expected = (weight / weight.sum(-1, keepdim=True)).mean(0)
    live = torch.ones(1, 1, 7, dtype=torch.bool, device=DEVICE)
    score = reference.expected(
        mean[None], (root @ root.mT)[None], k, k, live,
        scale=SCALE, epsilon=0.0, spread=True, value_norm=False,
    )  # fmt: skip
    # the exponent's deviation is near 1: a sample mean is known to 2 / sqrt(samples), five times
    torch.testing.assert_close(score[0, 0].double(), expected, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": -1.0}, "the scale must be positive, not -1.0"),
        ({"window": 0}, "the window must be positive, not 0"),
        ({"k": torch.zeros(1, 1, 4, 16, dtype=torch.float64)}, "fp32, fp16 or bf16, both alike"),
        ({"q": torch.zeros(1, 1, 4, 1024)}, "head_dim 1024 is more than 512"),
        ({"q": torch.zeros(1, 1, 16, 4).transpose(2, 3)}, "must lie next to each other"),
    ],
    ids=["scale", "window", "dtype", "head_dim", "strides"],
)
def test_refusals(change, reason):
    operands = {"q": torch.zeros(1, 1, 4, 16), "k": torch.zeros(1, 1, 4, 16)}
    attributes = {"scale": 1.0, "window": 4}
    for name, value in change.items():
        (operands if name in operands else attributes)[name] = value
    q, k = (x.to(DEVICE) for x in operands.values())
    live = torch.ones(1, 1, 4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(UnsupportedShape, match=reason):
        kernels.window(q, k, live, **attributes)
    assert kernels.constraint("window", q, k, live, **attributes) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4, 1000, 128), (1, 8, 2049, 64)], ids=str)
def test_long_prompts(shape):
    q, k, live = prompt(*shape, torch.bfloat16)
    assert_near(kernels.columns(q, k, live, scale=SCALE), truth(q, k, live), q, k)
