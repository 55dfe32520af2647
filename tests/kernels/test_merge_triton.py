"""The merge kernels against the reference, and against one set after the other in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.kernels.merge import reference
from kvfx.kernels.merge import triton as kernels
from kvfx.kernels.merge.runs import run_sum, runs
from kvfx.kernels.merge.weights import ahead_shares
from kvfx.testing.numerics import assert_as_accurate_as
from kvfx.testing.offline import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tiles of the interpreter have 8 rows, short runs 16
ROWS = [1, 7, 8, 9, 50]
EXACT = {"threshold": None, "sinks": 1, "recent": 0.17, "heavy": 0.12, "linkage": "chain"}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, scores and live rows: the first has padding, whose rows are garbage."""
    rows = shape[2]
    k = torch.randn(shape, device=DEVICE).cumsum(2).to(dtype)
    v = torch.randn(shape, device=DEVICE).to(dtype)
    score = torch.rand(shape[:3], device=DEVICE)
    live = torch.ones(shape[:3], dtype=torch.bool, device=DEVICE)
    live[0, :, : rows // 4] = False
    for x in (k, v, score):
        x[~live] = NAN
    return k, v, score, live


def in_runs(live: Tensor, count: int) -> Tensor:
    """Targets of `count` random runs per row and head."""
    k, score = torch.randn(*live.shape, 3, device=DEVICE), torch.rand(live.shape, device=DEVICE)
    counts = torch.full(live.shape[:2], count, device=DEVICE)
    return reference.sets(k, score, live, counts, **{**EXACT, "recent": 0.0, "heavy": 0.0})


def mean_truth(x: Tensor, target: Tensor, weight: Callable[[int, int, int, Tensor], Tensor]):
    """Leaders as weighted means of their sets in fp64, one after the other; the others as they
    are.
    """
    out = x.double().clone()
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for leader in set(target[b, h].tolist()) - {-1}:
                rows = (target[b, h] == leader).nonzero()[:, 0]
                share = weight(b, h, leader, rows)
                if len(rows) > 1 and share.sum() > 0:
                    out[b, h, leader] = share @ x[b, h, rows].double() / share.sum()
    return out


def gauss_truth(k: Tensor, votes: Tensor | None) -> Callable[[int, int, int, Tensor], Tensor]:
    """Weights of a set: `dist`, in fp64."""

    def weight(b: int, h: int, leader: int, rows: Tensor) -> Tensor:
        distance = (k[b, h, rows].double() - k[b, h, leader].double()).norm(dim=-1)
        sigma = distance.sum() / (2**0.5 * len(rows))
        g = torch.exp(-distance.square() / (2 * sigma.square())) if sigma > 0 else distance + 1
        return g if votes is None else g * votes[b, h, rows].double().exp()

    return weight


def assert_accurate(out: Tensor, low: Tensor, truth: Tensor, where: Tensor) -> None:
    """`assert_as_accurate_as` on the rows of a mask: what stays garbage is no number."""
    assert out.dtype == low.dtype
    where = where.cpu()
    assert_as_accurate_as(
        out.cpu()[where], low_precision=low.cpu()[where], truth=truth.cpu()[where]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_sets(rows, dtype, poison):
    k, _, score, live = drawn(2, 2, rows, 20, dtype=dtype)
    count = torch.tensor([[3, rows // 2], [1, rows]], device=DEVICE)
    for how in (EXACT, {**EXACT, "threshold": 0.9}, {**EXACT, "threshold": 1.0, "sinks": 0}):
        assert torch.equal(
            kernels.sets(k, score, live, count, **how),
            reference.sets(k, score, live, count, **how),
        )


def test_similarity_of_odd_keys():
    """Zeros have no direction, parallel ones no more than one, what is no number stays none."""
    k = torch.tensor([[0.0, 0], [1, 1], [3, 3], [NAN, 1], [1e-30, 0], [1e-30, 0]], device=DEVICE)
    live = torch.ones(1, 1, 6, dtype=torch.bool, device=DEVICE)
    score, count = torch.ones(1, 1, 6, device=DEVICE), torch.ones(1, 1, device=DEVICE).long()
    for threshold in (-0.5, 0.5, 0.99, 1.0):
        how = {**EXACT, "threshold": threshold, "sinks": 0, "recent": 0.0, "heavy": 0.0}
        found = kernels.sets(k[None, None], score, live, count, **how)
        assert torch.equal(found, reference.sets(k[None, None], score, live, count, **how))


@pytest.mark.parametrize("voted", [False, True], ids=["single", "voted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_gaussian(rows, dtype, voted, poison):
    k, v, _, live = drawn(2, 2, rows, 12, dtype=dtype)
    target = in_runs(live, max(1, rows // 3))
    votes = torch.randint(1, 9, live.shape, device=DEVICE).float().log() if voted else None
    if votes is not None:
        votes[~live] = NAN
    how = {"sigma": "dist", "width": 5.0, "scaled": False}
    out = kernels.gaussian(k, v, target, votes, **how)
    low = reference.gaussian(k, v, target, votes, **how)
    weight = gauss_truth(k, votes)
    for found, right, x in zip(out, low, (k, v), strict=True):
        assert_accurate(found, right, mean_truth(x, target, weight), live)
        # rows that lead nothing else stay bit for bit
        size = reference.numbers(torch.ones_like(target), target)
        assert torch.equal(found[live & (size < 2)], x[live & (size < 2)])


@pytest.mark.parametrize("sigma", ["dist", "fixed", "rms", "two_step", "literal"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_gaussian_modes(sigma, scaled):
    k, v, _, live = drawn(1, 2, 40, 4)
    target = in_runs(live, 9)
    for votes in (None, torch.where(live, torch.rand(live.shape, device=DEVICE), NAN)):
        how = {"sigma": sigma, "width": 2.0, "scaled": scaled}
        out = kernels.gaussian(k, v, target, votes, **how)
        for found, right in zip(out, reference.gaussian(k, v, target, votes, **how), strict=True):
            # sums in another order; the width is its own square root or sum
            torch.testing.assert_close(found[live], right[live], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [5, 80])
def test_long_runs_and_widths(width, poison):
    """Runs longer than a tile reads side by side, whose leader is anywhere."""
    k, v, score, live = drawn(1, 2, 50, width)
    live[:] = True
    k, v, score = (torch.randn_like(x) for x in (k, v, score))
    for count in (1, 3):
        target = in_runs(live, count)
        out = kernels.gaussian(k, v, target, None, sigma="rms", width=0.0, scaled=False)
        low = reference.gaussian(k, v, target, None, sigma="rms", width=0.0, scaled=False)
        for found, right in zip(out, low, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
        value = kernels.weighted(k, v, target, score.abs())[1]
        truth = mean_truth(v, target, lambda b, h, _, rows: score.abs()[b, h, rows].double())
        low = reference.weighted(k, v, target, score.abs())[1]
        assert_accurate(value, low, truth, live)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_weighted(rows, dtype, poison):
    k, v, weight, live = drawn(2, 2, rows, 12, dtype=dtype)
    keep = live & (torch.rand(live.shape, device=DEVICE) < 0.4)
    target = reference.next_kept(keep, live)
    weight[..., ::3] = 0.0
    weight[1, 1] = 0.0
    weight[~live] = 0.0
    out_k, out = kernels.weighted(k, v, target, weight)
    assert torch.equal(out_k.nan_to_num(), k.nan_to_num())
    assert out_k.data_ptr() != k.data_ptr()
    clean = torch.where(live[..., None], v, 0.0)
    truth = mean_truth(clean, target, lambda b, h, _, x: weight[b, h, x].double())
    low = reference.weighted(k, v, target, weight)[1]
    assert_accurate(out, low, truth, live)
    assert torch.equal(out[1, 1], v[1, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "targets"), [(1, 3), (15, 1), (33, 16), (80, 5), (80, 99)])
def test_ahead(rows, targets, dtype, poison):
    k, v, score, live = drawn(2, 2, rows, 12, dtype=dtype)
    keep = live & (torch.rand(live.shape, device=DEVICE) < 0.5)
    if rows > 1:
        keep[1, 1] = False
    position = live.long().cumsum(-1) - 1
    how = {"targets": targets, "seed": 5}
    out_k, out = kernels.ahead(k, v, keep, live, score, position, **how)
    assert torch.equal(out_k.nan_to_num(), k.nan_to_num())
    low = reference.ahead(k, v, keep, live, score, position, **how)[1]
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
    share, before = ahead_shares(keep, live, score, position, order, **how)
    truth = v.double().clone()
    for b in range(2):
        for h in range(2):
            ranks = keep[b, h].nonzero()[:, 0]
            for row in share[b, h].nonzero()[:, 0].tolist():
                to = ranks[before[b, h, row] :][:targets]
                truth[b, h, to] += v[b, h, row].double() / len(to)
    assert_accurate(out, low, truth, live)


def test_operands_may_be_strided():
    shape = (2, 20, 3, 8)
    k, v = (torch.randn(shape, device=DEVICE).transpose(1, 2) for _ in range(2))
    live = torch.ones(2, 1, 20, dtype=torch.bool, device=DEVICE).expand(-1, 3, -1)
    score = torch.rand(2, 20, 3, device=DEVICE).transpose(1, 2)
    target = in_runs(live, 6).transpose(1, 2).contiguous().transpose(1, 2)
    votes = torch.rand(2, 20, 3, device=DEVICE).transpose(1, 2)
    keep = reference.lead_rows(target)
    gauss = {"sigma": "dist", "width": 0.0, "scaled": True}
    count = torch.full((2, 1), 7, device=DEVICE).expand(-1, 3)
    cases = {
        "sets": ((k, score, live, count), EXACT),
        "gaussian": ((k, v, target, votes), gauss),
        "weighted": ((k, v, target, score), {}),
        "ahead": ((k, v, keep, live, score, None), {"targets": 4, "seed": 1}),
    }
    for name, (operands, how) in cases.items():
        out, right = (getattr(room, name)(*operands, **how) for room in (kernels, reference))
        pairs = [(out, right)] if name == "sets" else list(zip(out, right, strict=True))
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
            if x.is_floating_point():
                assert x.stride() == y.stride() == k.stride(), name
    # channels that lie apart are copied
    apart = torch.randn(2, 3, 8, 20, device=DEVICE).transpose(2, 3)
    for name in ("gaussian", "weighted", "ahead"):
        operands, how = cases[name]
        out = getattr(kernels, name)(apart, apart, *operands[2:], **how)
        right = getattr(reference, name)(apart, apart, *operands[2:], **how)
        for x, y in zip(out, right, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_runs():
    target = torch.tensor([[[-1, -1, 3, 3, 4, 6, 6, 6, -1]]])
    first, last = runs(target)
    assert first.tolist() == [[[0, 0, 2, 2, 4, 5, 5, 5, 8]]]
    assert last.tolist() == [[[1, 1, 3, 3, 4, 7, 7, 7, 8]]]
    x = torch.tensor([[[1e8, 1, 2, 3, 4, 5, 6, 7, 8]]])
    expected = [[[1e8, 1e8, 5, 5, 4, 18, 18, 18, 8]]]
    assert run_sum(x, first, last).tolist() == expected


def test_refusals():
    k = torch.ones(1, 1, 4, 2, dtype=torch.float64, device=DEVICE)
    target = torch.zeros(1, 1, 4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(UnsupportedShape, match=r"fp32, fp16 or bf16, not torch.float64"):
        kernels.weighted(k, k, target, torch.ones(1, 1, 4, device=DEVICE))
    wide = torch.ones(1, 1, 4, 513, device=DEVICE)
    with pytest.raises(UnsupportedShape, match="head_dim 513 is more than 512"):
        kernels.weighted(wide, wide, target, torch.ones(1, 1, 4, device=DEVICE))
    with pytest.raises(UnsupportedShape, match="the reference does that"):
        kernels.sets(
            wide[..., :2], torch.ones(1, 1, 4, device=DEVICE), target == 0, target[..., 0],
            **{**EXACT, "threshold": 0.5, "linkage": "anchor"},
        )  # fmt: skip


def test_launchers_read_no_data():
    from kvfx.testing.shipped.merge import VARIANTS

    for launcher in VARIANTS.values():
        assert launches(launcher, "sm_90")
