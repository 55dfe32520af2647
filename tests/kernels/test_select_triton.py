"""The select kernel: the same choice as the reference, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.select import reference
from kvfx.kernels.select import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")
# the interpreter reads 64 rows at a time
ROWS = [1, 63, 64, 65, 200]


def chosen(score: Tensor, live: Tensor, count: int, sinks: int, recent: int) -> list[bool]:
    """One row with Python's sort: protected rows, then by score, the smaller index first."""
    index = [i for i, alive in enumerate(live.tolist()) if alive]
    protected = set(index[:sinks]) | set(index[len(index) - min(recent, len(index)) :])
    ranked = [-INF if math.isnan(x) else x for x in score.tolist()]
    order = sorted(index, key=lambda i: (0, 0.0, i) if i in protected else (1, -ranked[i], i))
    return [i in order[: max(count, 0)] for i in range(len(live))]


def assert_chosen(keep: Tensor, score: Tensor, live: Tensor, count: Tensor, *how: int) -> None:
    """Pass when every row and head of `keep` is the choice of `chosen`."""
    assert keep.dtype == torch.bool
    for b in range(score.shape[0]):
        for h in range(score.shape[1]):
            expected = chosen(score[b, h].float(), live[b, h], int(count[b, h]), *how)
            assert keep[b, h].tolist() == expected, (b, h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_scores(dtype, poison):
    """Few values, many ties."""
    score = torch.randn(1, 2, 100, device=DEVICE).to(dtype)
    live = torch.rand(1, 2, 100, device=DEVICE) < 0.8
    count = torch.tensor([[20, 50]], device=DEVICE)
    keep = kernels.select_top(score, live, count, 2, 3)
    assert torch.equal(keep, reference.select_top(score, live, count, 2, 3))


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 3), (1, 64), (70, 0)], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_select_top(rows, sinks, recent, poison):
    score = torch.randn(2, 2, rows, device=DEVICE)
    live = torch.rand(2, 2, rows, device=DEVICE) < 0.8
    live[1] = True
    live[0, 0] = False
    count = torch.tensor([[3, rows // 2], [1, rows]], device=DEVICE)
    keep = kernels.select_top(score, live, count, sinks, recent)
    assert torch.equal(keep, reference.select_top(score, live, count, sinks, recent))
    assert_chosen(keep, score, live, count, sinks, recent)


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("rows", [65, 200])
def test_ties(rows, levels, poison):
    """Equal scores prefer the smaller index, across blocks too."""
    score = torch.randint(-levels, levels, (2, 3, rows), device=DEVICE).float()
    live = torch.rand(2, 3, rows, device=DEVICE) < 0.9
    count = torch.tensor([[0, 1, 2], [40, rows - 1, rows + 9]], device=DEVICE)
    for how in ((0, 0), (2, 5)):
        keep = kernels.select_top(score, live, count, *how)
        assert torch.equal(keep, reference.select_top(score, live, count, *how))
        assert_chosen(keep, score, live, count, *how)


def test_both_zeros_are_equal():
    score = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, -1e-45, 1e-45]]], device=DEVICE)
    live = torch.ones(1, 1, 6, dtype=torch.bool, device=DEVICE)
    for count in range(7):
        keep = kernels.select_top(score, live, torch.tensor([[count]], device=DEVICE), 0, 0)
        assert keep[0, 0].tolist() == [i in [5, 0, 1, 2, 3, 4][:count] for i in range(6)]


@pytest.mark.parametrize("how", [(0, 0), (1, 0), (0, 1), (2, 2)], ids=str)
def test_scores_that_are_no_numbers(how):
    """NaN is the smallest score, infinities rank below sinks and above what is not live."""
    values = [NAN, INF, 3.0, -INF, -NAN, 3.4e38, -3.4e38, 1e-40, 0.0, INF, -INF, NAN]
    score = torch.tensor([[values, values[::-1]]], device=DEVICE)
    live = torch.ones(1, 2, len(values), dtype=torch.bool, device=DEVICE)
    live[..., :2] = False
    for count in (0, 1, 2, 5, 7, 9, 10, 12):
        counts = torch.full((1, 2), count, device=DEVICE)
        keep = kernels.select_top(score, live, counts, *how)
        assert_chosen(keep, score, live, counts, *how)


def test_operands_may_be_expanded():
    """Live rows and counts are often one per row of the batch, read as one per head."""
    score = torch.randn(2, 50, 3, device=DEVICE).transpose(1, 2)
    live = (torch.arange(50, device=DEVICE) >= torch.tensor([[0], [9]], device=DEVICE))[:, None]
    live = live.expand(-1, 3, -1)
    count = torch.tensor([[7], [20]], dtype=torch.int32, device=DEVICE).expand(-1, 3)
    keep = kernels.select_top(score, live, count, 2, 2)
    assert torch.equal(keep, reference.select_top(score, live, count, 2, 2))


def test_refusals():
    live = torch.ones(1, 1, 4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(UnsupportedShape, match=r"scores are fp32, fp16 or bf16, not torch.float64"):
        kernels.select_top(live.double(), live, torch.ones(1, 1, device=DEVICE), 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [32768, 131072])
def test_long_rows(rows):
    score = torch.randn(2, 4, rows, device=DEVICE).half().float()
    live = torch.rand(2, 4, rows, device=DEVICE) < 0.9
    count = torch.randint(1, rows, (2, 4), device=DEVICE)
    keep = kernels.select_top(score, live, count, 4, 32)
    assert torch.equal(keep, reference.select_top(score, live, count, 4, 32))
