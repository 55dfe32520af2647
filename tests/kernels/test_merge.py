"""The merge room: golden values of the specification, and one row at a time in Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kvfx.errors import PolicyError
from kvfx.kernels.dense.reference import attend
from kvfx.kernels.merge import reference as merge
from kvfx.kernels.merge.similarity import cosine
from kvfx.kernels.merge.weights import draws

NAN, INF = float("nan"), float("inf")
ANGLES = torch.tensor([0, 20, 45, 50, 140, 150, 155, 160]).deg2rad()
NORMS = torch.tensor([1, 2, 1.5, 1, 1, 1, 2, 1])
GOLDEN_K = (NORMS[:, None] * torch.stack((ANGLES.cos(), ANGLES.sin()), -1))[None, None]
GOLDEN_V = torch.arange(16.0).view(1, 1, 8, 2)
GOLDEN_A = torch.tensor([5.0, 1, 2, 1, 1, 3, 1, 4])[None, None]
LIVE = torch.ones(1, 1, 8, dtype=torch.bool)
SIGMAS = ["dist", "fixed", "rms", "two_step", "literal"]


def merge_sets(
    k: Tensor, score: Tensor, live: Tensor, count: int = 0, threshold: float | None = None,
    sinks: int = 0, recent: float = 0.0, heavy: float = 0.0, linkage: str = "chain",
) -> Tensor:  # fmt: skip
    return merge.sets(
        k, score, live, torch.full(live.shape[:2], count),
        threshold=threshold, sinks=sinks, recent=recent, heavy=heavy, linkage=linkage,
    )  # fmt: skip


def gaussian(
    k: Tensor, v: Tensor, target: Tensor, votes: Tensor | None = None, sigma: str = "dist",
    width: float = 5.0, scaled: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return merge.gaussian(k, v, target, votes, sigma=sigma, width=width, scaled=scaled)


def gauss_weights(k: Tensor, target: Tensor, sigma: str) -> list[float]:
    """What each of the rows weighs in its set: values that are one-hot come out as weights."""
    one_hot = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    return gaussian(k, one_hot, target, sigma=sigma)[1][0, 0, int(target[0, 0, 0])].tolist()


def drawn(*shape: int, live: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, scores, and live rows with padding on the left of the first."""
    batch, kv_heads, rows, width = shape
    k = torch.randn(shape).cumsum(2)
    alive = torch.ones(batch, kv_heads, rows, dtype=torch.bool)
    alive[0, :, : round(rows * (1 - live))] = False
    return k, torch.randn(batch, kv_heads, rows, width + 2), torch.rand(shape[:3]), alive


def members(target: Tensor) -> dict[int, list[int]]:
    """The sets of one row and head: leader -> rows."""
    found: dict[int, list[int]] = {}
    for row, leader in enumerate(target.tolist()):
        if leader >= 0:
            found.setdefault(leader, []).append(row)
    return found


def close(values: list[float], expected: tuple[float, ...]) -> None:
    """Pass when all printed digits agree."""
    assert values == pytest.approx(list(expected), abs=6e-7)


def test_golden_cosines():
    expected = (0.939693, 0.906308, 0.996195, 0.0, 0.984808, 0.996195, 0.996195)
    close(cosine(GOLDEN_K[0, 0, :-1], GOLDEN_K[0, 0, 1:]).tolist(), expected)


@pytest.mark.parametrize(
    ("sinks", "recent", "expected"),
    [
        (0, 0.0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (1, 0.0, [[0], [1, 2, 3], [4, 5, 6, 7]]),
        (0, 0.125, [[0, 1, 2, 3], [4, 5, 6], [7]]),
        (1, 0.125, [[0], [1, 2, 3], [4, 5, 6], [7]]),
    ],
    ids=str,
)
def test_golden_sets(sinks, recent, expected):
    target = merge_sets(
        GOLDEN_K, GOLDEN_A, LIVE, threshold=0.75, sinks=sinks, recent=recent
    )  # fmt: skip
    found = members(target[0, 0])
    assert list(found.values()) == expected
    for leader, rows in found.items():
        assert leader == max(rows, key=lambda row: (GOLDEN_A[0, 0, row], -row))


@pytest.mark.parametrize(
    ("rows", "weights", "key"),
    [
        ([0, 1, 2, 3], (0.650216, 0.073870, 0.089974, 0.185940), (1.003998, 0.288400)),
        ([4, 5, 6, 7], (0.194600, 0.360799, 0.000427, 0.444174), (-0.879695, 0.457763)),
        ([1, 2, 3], (0.019232, 0.750105, 0.230663), (0.980018, 0.985460)),
    ],
    ids=str,
)
def test_golden_merges(rows, weights, key):
    score = GOLDEN_A[:, :, rows]
    target = merge_sets(GOLDEN_K[:, :, rows], score, LIVE[:, :, rows], count=1)
    close(gauss_weights(GOLDEN_K[:, :, rows], target, "dist"), weights)
    pivot = int(target[0, 0, 0])
    close(gaussian(GOLDEN_K[:, :, rows], score[..., None], target)[0][0, 0, pivot].tolist(), key)


def test_golden_modes():
    k, v, target = GOLDEN_K[:, :, :4], GOLDEN_V[:, :, :4], torch.zeros(1, 1, 4, dtype=torch.int64)
    close(gaussian(k, v, target)[1][0, 0, 0].tolist(), (1.623275, 2.623275))
    fixed = (0.253873, 0.247649, 0.248207, 0.250272)
    close(gauss_weights(k, target, "fixed"), fixed)
    close(gaussian(k, v, target, sigma="fixed")[0][0, 0, 0].tolist(), (1.143435, 0.624384))
    close(gauss_weights(k, target, "rms")[:1], (0.391025,))
    close(gauss_weights(k, target, "literal")[:1], (0.999989,))
    paper = gaussian(k, v, target, scaled=True)[1][0, 0, 0]
    close((paper / 4).tolist(), (1.623275, 2.623275))


@pytest.mark.parametrize(
    ("distance", "expected"), [(0.1, 0.252), (0.5, 0.357), (1.0, 1.0), (7.0, 1.0)], ids=str
)
def test_the_published_width_collapses(distance, expected):
    k = torch.tensor([[0.0], [distance], [distance], [distance]])[None, None]
    weights = gauss_weights(k, torch.zeros(1, 1, 4, dtype=torch.int64), "literal")
    assert weights[0] == pytest.approx(expected, abs=5e-4)


def test_two_steps_are_those_of_the_definition():
    k = torch.randn(1, 1, 5, 3)
    distance = (k[0, 0] - k[0, 0, 2]).norm(dim=-1).double()
    first = torch.exp(-distance.square() / (2 * distance.square().mean()))
    width = first.sum() / (math.sqrt(2) * 5)
    g = torch.exp(-distance.square() / (2 * width.square()))
    weights = gauss_weights(k, torch.full((1, 1, 5), 2), "two_step")
    assert weights == pytest.approx((g / g.sum()).tolist(), abs=1e-6)


def test_enough_entries_change_nothing():
    k, v, score, live = drawn(2, 3, 63, 8, live=0.8)
    alone = torch.where(live, torch.arange(63), -1)
    for target in (
        merge_sets(k, score, live, count=63),
        merge_sets(k, score, live, threshold=1.0),
        merge_sets(torch.ones_like(k), score, live, threshold=1.0),
        merge_sets(k, score, live, threshold=-2.0, sinks=100),
        merge_sets(k, score, live, threshold=-2.0, recent=1.0),
        merge_sets(k, score, live, threshold=-2.0, heavy=1.0),
    ):
        assert torch.equal(target, alone)
    for out, x in zip(gaussian(k, v, alone, scaled=True), (k, v), strict=True):
        assert torch.equal(out, x)
    assert torch.equal(merge.lead_rows(alone), live)


@pytest.mark.parametrize(
    ("recent", "heavy", "sinks"), [(0.0, 0.0, 0), (0.17, 0.12, 4), (0.5, 0.5, 9)], ids=str
)
@pytest.mark.parametrize("count", [0, 1, 2, 20, 33, 62, 63, 64])
def test_exactly_that_many_entries(count, recent, heavy, sinks):
    k, _, score, live = drawn(2, 3, 63, 8, live=0.5)
    target = merge_sets(k, score, live, count, sinks=sinks, recent=recent, heavy=heavy)
    assert torch.equal(merge.lead_rows(target).sum(-1), live.sum(-1).clamp(max=max(count, 1)))
    for b in range(2):
        for h in range(3):
            found = members(target[b, h])
            assert (
                sorted(itertools.chain(*found.values())) == live[b, h].nonzero().flatten().tolist()
            )
            for leader, rows in found.items():
                assert rows == list(range(rows[0], rows[-1] + 1))
                assert leader == max(rows, key=lambda row: (score[b, h, row].item(), -row))


def test_exact_takes_the_most_similar_neighbours():
    k, _, score, live = drawn(1, 1, 40, 4)
    near = cosine(k[0, 0, :-1], k[0, 0, 1:])
    for count in (5, 20, 39):
        target = merge_sets(k, score, live, count)[0, 0]
        chosen = set(near.argsort(descending=True, stable=True)[: 40 - count].tolist())
        assert {t for t in range(39) if target[t] == target[t + 1]} == chosen
    # equal cosines: the smaller index
    target = merge_sets(torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6), live[..., :6], 4)
    assert target.tolist() == [[[0, 0, 0, 3, 4, 5]]]


def test_protected_rows_stay_alone():
    k, _, score, live = drawn(2, 2, 50, 4, live=0.8)
    score[0, 0, ::3] = NAN
    target = merge_sets(k, score, live, threshold=-2.0, sinks=2, recent=0.17, heavy=0.12)
    for b in range(2):
        index = live[b, 0].nonzero().flatten().tolist()
        recents = index[len(index) - int(0.17 * len(index)) :]
        for h in range(2):
            others = [i for i in index if i not in recents and i not in index[:2]]
            values = score[b, h].nan_to_num(nan=-INF).tolist()
            heavy = sorted(others, key=lambda i: (-values[i], i))[: int(0.12 * len(index))]
            alone = {*index[:2], *recents, *heavy}
            found = members(target[b, h])
            assert all(found[row] == [row] for row in alone)
            # everything else merges with its free neighbours
            assert all(
                target[b, h, t] == target[b, h, t + 1]
                for t in index[:-1] if t not in alone and t + 1 not in alone
            )  # fmt: skip


def test_protection_goes_in_order():
    """Sinks and heavy rows by their score, then recent rows, the oldest first."""
    score = torch.tensor([[[9.0, 1, 2, 8, 3, 4, 0, 0]]])
    k = torch.ones(1, 1, 8, 2)
    # protected: 0 (sink), 3 (heavy), 6 and 7 (recent)
    found = [
        members(merge_sets(k, score, LIVE, n, sinks=1, recent=0.25, heavy=0.125)[0, 0])
        for n in range(6, 0, -1)
    ]
    assert [list(x.values()) for x in found] == [
        [[0], [1, 2], [3], [4, 5], [6], [7]],
        [[0], [1, 2, 3], [4, 5], [6], [7]],
        [[0], [1, 2, 3, 4, 5], [6], [7]],
        [[0, 1, 2, 3, 4, 5], [6], [7]],
        [[0, 1, 2, 3, 4, 5, 6], [7]],
        [[0, 1, 2, 3, 4, 5, 6, 7]],
    ]


def test_a_larger_threshold_never_leaves_fewer():
    k, _, score, live = drawn(2, 2, 63, 4)
    left = [
        merge.lead_rows(merge_sets(k, score, live, threshold=eps)).sum(-1)
        for eps in (-2.0, 0.0, 0.5, 0.9, 0.99, 1.0)
    ]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(left))
    assert left[0].tolist() == [[1, 1], [1, 1]]


def test_linkage():
    """Directions 0, 20, 45, 50 are one chain; 45 is not like 0."""
    k, score = GOLDEN_K[:, :, :4], GOLDEN_A[:, :, :4]
    live = LIVE[..., :4]
    assert merge_sets(k, score, live, threshold=0.75).tolist() == [[[0, 0, 0, 0]]]
    target = merge_sets(k, score, live, threshold=0.75, linkage="anchor")
    assert target.tolist() == [[[0, 0, 2, 2]]]
    target = merge_sets(k, score, live, threshold=0.75, linkage="anchor", sinks=1)
    assert target.tolist() == [[[0, 2, 2, 2]]]
    with pytest.raises(PolicyError, match="'anchor' needs a threshold"):
        merge_sets(k, score, live, count=2, linkage="anchor")
    with pytest.raises(PolicyError, match="chain, anchor, not 'ward'"):
        merge_sets(k, score, live, count=2, linkage="ward")
    with pytest.raises(PolicyError, match="not 'wide'"):
        gaussian(k, k, torch.zeros(1, 1, 4, dtype=torch.int64), sigma="wide")


def test_keys_may_be_zero_or_garbage_where_not_live():
    k, v, score, live = drawn(1, 2, 20, 4, live=0.5)
    clean = merge_sets(k, score, live, 4, sinks=1, recent=0.2, heavy=0.1)
    expected = gaussian(k, v, clean)
    for x in (k, v, score):
        x[~live] = NAN
    dirty = merge_sets(k, score, live, 4, sinks=1, recent=0.2, heavy=0.1)
    assert torch.equal(clean, dirty)
    for out, right in zip(gaussian(k, v, dirty), expected, strict=True):
        assert torch.equal(out[live], right[live])
    zero = merge_sets(torch.zeros(1, 1, 4, 3), torch.ones(1, 1, 4), LIVE[..., :4], threshold=0.5)
    assert zero.tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("threshold", [None, 0.8], ids=str)
def test_padding_rows_and_heads_do_not_matter(threshold):
    k, v, score, _ = drawn(2, 3, 30, 4)
    how = {"count": 11, "threshold": threshold, "sinks": 2, "recent": 0.17, "heavy": 0.12}
    live = torch.ones(2, 3, 30, dtype=torch.bool)
    target = merge_sets(k, score, live, **how)
    padded = [torch.cat((x[:, :, :7], x), 2) for x in (k, v, score, ~live & live)]
    padded[3][:, :, 7:] = True
    shifted = merge_sets(padded[0], padded[2], padded[3], **how)
    assert torch.equal(shifted[..., 7:], target + 7)
    assert bool((shifted[..., :7] == -1).all())
    for out, right in zip(
        gaussian(padded[0], padded[1], shifted), gaussian(k, v, target), strict=True
    ):
        assert torch.equal(out[:, :, 7:], right)
    turned = merge_sets(k.flip(1)[1:], score.flip(1)[1:], live[1:], **how)
    assert torch.equal(turned, target.flip(1)[1:])


@pytest.mark.parametrize("sigma", SIGMAS)
def test_weights_are_convex_and_the_pivot_weighs_most(sigma):
    k, _, score, live = drawn(2, 2, 33, 6, live=0.7)
    target = merge_sets(k, score, live, 9)
    one_hot = torch.eye(33).expand(2, 2, -1, -1)
    merged, weights = gaussian(k, one_hot, target, sigma=sigma)
    led = merge.lead_rows(target)
    assert bool((weights[led] >= 0).all())
    torch.testing.assert_close(weights[led].sum(-1), torch.ones(int(led.sum())))
    for b in range(2):
        for h in range(2):
            for leader, rows in members(target[b, h]).items():
                row = weights[b, h, leader]
                assert set(row.nonzero().flatten().tolist()) <= set(rows)
                assert row[leader] == row.max()
                assert merged[b, h, leader].norm() <= k[b, h, rows].norm(dim=-1).max() * (1 + 1e-6)
                if len(rows) == 1:
                    assert torch.equal(merged[b, h, leader], k[b, h, leader])


@pytest.mark.parametrize("sigma", SIGMAS)
def test_identical_keys(sigma):
    k = torch.randn(1, 2, 1, 6).expand(-1, -1, 5, -1).contiguous()
    v, target = torch.randn(1, 2, 5, 3), torch.full((1, 2, 5), 3)
    merged, value = gaussian(k, v, target, sigma=sigma)
    assert torch.equal(merged, k)
    torch.testing.assert_close(value[:, :, 3], v.mean(2))
    votes = torch.tensor([1.0, 2, 1, 4, 1]).log().expand(1, 2, -1)
    _, value = gaussian(k, v, target, votes, sigma=sigma)
    torch.testing.assert_close(value[:, :, 3], (v * votes.exp()[..., None]).sum(2) / 9)


def test_scales_of_keys():
    k, v, score, live = drawn(1, 2, 20, 4)
    target = merge_sets(k, score, live, 5)
    assert torch.equal(merge_sets(3 * k, score, live, 5), target)
    for sigma in ("dist", "rms"):
        torch.testing.assert_close(
            gaussian(3 * k, v, target, sigma=sigma)[1], gaussian(k, v, target, sigma=sigma)[1]
        )
    fixed = [gaussian(x, v, target, sigma="fixed", width=1.0)[1] for x in (k, 3 * k)]
    assert (fixed[0] - fixed[1]).abs().max() > 1e-2


def test_scaled_values_merge_again():
    """What is scaled by its tokens once is scaled by all of them after a second merge."""
    k, v = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    target = torch.tensor([[[0, 0, 0, 3]]])
    v = gaussian(k, v, target, scaled=True)[1]
    assert v[0, 0, [0, 3], 0].tolist() == [3.0, 1.0]
    votes = merge.votes(target, None)
    again = torch.tensor([[[0, -1, -1, 0]]])
    assert gaussian(k, v, again, votes, scaled=True)[1][0, 0, 0, 0] == pytest.approx(4.0)
    alone = torch.tensor([[[0, -1, -1, 3]]])
    assert torch.equal(gaussian(k, v, alone, votes, scaled=True)[1], v)


def test_merging_twice_is_merging_once():
    """Of identical keys, in any order: counts carry over."""
    k, v = torch.ones(1, 1, 6, 2), torch.randn(1, 1, 6, 2)
    once = gaussian(k, v, torch.zeros(1, 1, 6, dtype=torch.int64))[1][0, 0, 0]
    first = torch.tensor([[[1, 1, 1, 3, 4, 4]]])
    votes = merge.votes(first, None)
    second = torch.where(merge.lead_rows(first), 4, -1)
    twice = gaussian(k, gaussian(k, v, first)[1], second, votes)[1][0, 0, 4]
    torch.testing.assert_close(twice, once)
    assert merge.votes(second, votes)[0, 0].exp().tolist() == pytest.approx([1, 1, 1, 1, 6, 1])


@pytest.mark.parametrize("copies", [2, 6])
def test_votes_are_lossless_and_plain_merging_is_not(copies):
    """Sets of identical keys: attention with the votes as a bias is that of all rows."""
    torch.manual_seed(copies)
    rows, sets = 5 * copies, 5
    k = torch.randn(1, 2, sets, 8, dtype=torch.float64).repeat_interleave(copies, 2)
    v, q = torch.randn(1, 2, rows, 8).double(), torch.randn(1, 4, 1, 8).double()
    k, v, q = k.float(), v.float(), q.float()
    score, live = torch.rand(1, 2, rows), torch.ones(1, 2, rows, dtype=torch.bool)
    # the first set stays as it is: a cache of one size of set alone would not sag
    target = merge_sets(k, score, live, threshold=0.999, sinks=copies)
    assert merge.lead_rows(target).sum(-1).tolist() == [[copies + sets - 1] * 2]
    merged = gaussian(k, v, target)
    led, votes = merge.lead_rows(target), merge.votes(target, None)
    at = torch.tensor([[rows]])
    length = torch.full((1, 2), rows, dtype=torch.int32)
    dense = attend(q, at, k, v, length, scale=0.3)
    bias = votes.masked_fill(~led, -INF)
    torch.testing.assert_close(
        attend(q, at, *merged, length, bias=bias, scale=0.3), dense, rtol=0, atol=1e-6
    )
    plain = attend(q, at, *merged, length, bias=torch.where(led, 0.0, -INF), scale=0.3)
    assert (plain - dense).abs().max() > 1e-2


def test_plain_merging_of_the_whole_cache_is_lossless():
    k, v = torch.ones(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    target = torch.zeros(1, 1, 6, dtype=torch.int64)
    merged = gaussian(k, v, target)
    q, at = torch.randn(1, 1, 1, 4), torch.tensor([[6]])
    one, six = (torch.full((1, 1), n, dtype=torch.int32) for n in (1, 6))
    torch.testing.assert_close(
        attend(q, at, *merged, one, scale=1.0), attend(q, at, k, v, six, scale=1.0)
    )


def test_sums_votes_and_shifts():
    target = torch.tensor([[[-1, 1, 1, 4, 4, -1]]])
    x = torch.tensor([[[NAN, 1, 2, 4, 8, NAN]]])
    assert merge.numbers(x, target).tolist() == [[[0, 3, 0, 0, 12, 0]]]
    assert merge.votes(target, None).exp()[0, 0].tolist() == pytest.approx([1, 2, 1, 1, 2, 1])
    votes = torch.tensor([[[NAN, 0.0, 5.0, 500.0, 0.0, INF]]])
    found = merge.votes(target, votes)[0, 0].tolist()
    assert found == pytest.approx([0, math.log(1 + math.exp(5)), 0, 0, 500, 0])
    alone = torch.tensor([[[-1, 1, 2, 3, 4, -1]]])
    assert merge.votes(alone, votes)[0, 0].tolist() == [0, 0, 5, 500, 0, 0]
    position = torch.tensor([[[-1, 10, 20, 30, 45, 50]]], dtype=torch.int32)
    shift = merge.target_shift(target, position)
    assert shift.dtype == torch.int64
    assert shift.tolist() == [[[0, 0, -10, 15, 0, 0]]]
    assert merge.lead_rows(target).tolist() == [[[False, True, False, False, True, False]]]


@pytest.mark.parametrize("rows", [1, 63])
def test_next_kept(rows):
    live = torch.rand(2, 3, rows) < 0.8
    keep = live & (torch.rand(2, 3, rows) < 0.3)
    found = merge.next_kept(keep, live)
    for b in range(2):
        for h in range(3):
            index = keep[b, h].nonzero().flatten().tolist()
            after = [min((i for i in index if i >= t), default=-1) for t in range(rows)]
            expected = [at if live[b, h, t] else -1 for t, at in enumerate(after)]
            assert found[b, h].tolist() == expected


def test_weighted_values():
    _, v, weight, _ = drawn(2, 2, 40, 4)
    k = torch.randn(2, 2, 40, 3)
    keep = torch.rand(2, 2, 40) < 0.4
    target = merge.next_kept(keep, torch.ones_like(keep))
    out_k, out = merge.weighted(k, v, target, weight)
    assert torch.equal(out_k, k)
    assert out_k.data_ptr() != k.data_ptr()
    for b in range(2):
        for h in range(2):
            for kept, rows in members(target[b, h]).items():
                w, x = weight[b, h, rows].double(), v[b, h, rows].double()
                right = (w @ x / w.sum()).float()
                torch.testing.assert_close(out[b, h, kept], right)
            # the rule of the paper, one eviction after the other, with weights that add up
            x, w = v[b, h].clone(), weight[b, h].clone()
            for row in range(39):
                if not keep[b, h, row]:
                    x[row + 1] = (w[row] * x[row] + w[row + 1] * x[row + 1]) / (w[row] + w[row + 1])
                    w[row + 1] += w[row]
            torch.testing.assert_close(out[b, h, keep[b, h]], x[keep[b, h]])


def test_weights_that_are_equal_or_zero():
    k, v = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 3)
    target = torch.tensor([[[2, 2, 2, 3]]])

    def value(*weight: float) -> Tensor:
        return merge.weighted(k, v, target, torch.tensor([[weight]]))[1]

    torch.testing.assert_close(value(2, 2, 2, 1)[0, 0, 2], v[0, 0, :3].mean(0))
    assert torch.equal(value(0, 0, 0.3, 0.7), v)
    assert torch.equal(value(0, 0, 0, 0), v)
    torch.testing.assert_close(value(0, 5, 0, 0)[0, 0, 2], v[0, 0, 1])
    assert torch.equal(value(NAN, 2, 2, 1), value(0, 2, 2, 1))
    v[0, 0, 0] = NAN
    assert not value(0, 1, 1, 1)[:, :, 1:].isnan().any()


def test_nearest():
    k, _, score, live = drawn(2, 2, 150, 4, live=0.8)
    k = torch.randn_like(k)
    keep = live & (score < 0.2)
    gate = torch.full((2, 2), NAN)
    target = merge.nearest(k, keep, live, gate, past=0.5, present=0.5)
    unit = k / k.norm(dim=-1, keepdim=True)
    for b in range(2):
        for h in range(2):
            kept = keep[b, h].nonzero().flatten()
            evicted = (live & ~keep)[b, h].nonzero().flatten()
            u, found = (unit[b, h, evicted] @ unit[b, h, kept].T).max(-1)
            torch.testing.assert_close(gate[b, h], u.mean())
            assert torch.equal(target[b, h, kept], kept)
            assert torch.equal(target[b, h, evicted], torch.where(u >= gate[b, h], kept[found], -1))
            assert bool((target[b, h, ~live[b, h]] == -1).all())


def test_the_gate_moves():
    angle = torch.tensor([0.0, 60, 90, 180]).deg2rad()
    k = torch.stack((angle.cos(), angle.sin()), -1)[None, None].repeat(2, 1, 1, 1)
    k[:, :, 3] = NAN
    keep = torch.tensor([[[True, False, False, False]], [[True, True, True, False]]])
    live = torch.tensor([True, True, True, False]).expand(2, 1, -1)
    gate = torch.tensor([[NAN], [0.4]])
    # cosines .5 and 0: the mean is .25, then .3 * .25 + .7 * .25
    for expected in (0.25, 0.25):
        target = merge.nearest(k, keep, live, gate, past=0.3, present=0.7)
        assert gate[0].item() == pytest.approx(expected)
        assert gate[1].item() == pytest.approx(0.4)
        assert target.tolist() == [[[0, 0, -1, -1]], [[0, 1, 2, -1]]]
    gate[0] = 0.9
    target = merge.nearest(k, keep, live, gate, past=0.3, present=0.7)
    assert gate[0].item() == pytest.approx(0.3 * 0.9 + 0.7 * 0.25)
    assert target[0].tolist() == [[0, 0, -1, -1]]
    gate[0] = INF
    assert merge.nearest(k, keep, live, gate, past=1.0, present=0.0)[0].tolist() == [
        [0, -1, -1, -1]
    ]


@pytest.mark.parametrize("evicted", [1, 7, 100])
def test_what_is_as_similar_as_the_mean_is_merged(evicted):
    """Equal cosines are their own mean, whatever their number."""
    k = torch.randn(1, 20, 1, 2).repeat(1, 1, evicted + 1, 1)
    k[:, :, 0] = torch.randn(1, 20, 2)
    live = torch.ones(1, 20, evicted + 1, dtype=torch.bool)
    keep = (torch.arange(evicted + 1) == 0).expand_as(live)
    target = merge.nearest(k, keep, live, torch.full((1, 20), NAN), past=0.5, present=0.5)
    assert bool((target == 0).all())


def test_similar_keys():
    k, v = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 3)
    target = torch.tensor([[[0, 0, -1, 3, 3, 3]]]).expand(1, 2, -1)
    out_k, out_v = merge.similar(k, v, target)
    for h in range(2):
        for leader, rows in members(target[0, h]).items():
            u = torch.nn.functional.cosine_similarity(k[0, h, rows], k[0, h, leader][None], dim=-1)
            u[rows.index(leader)] = 1.0
            w = torch.softmax(u, 0)
            for out, x in ((out_k, k), (out_v, v)):
                torch.testing.assert_close(out[0, h, leader], w @ x[0, h, rows])
    same = torch.randn(1, 2, 1, 4).expand(-1, -1, 6, -1).contiguous()
    assert torch.equal(merge.similar(same, same, target)[1][:, :, [0, 3]], same[:, :, [0, 3]])
    dropped = torch.tensor([[[0, -1, -1, 3, -1, -1]]]).expand(1, 2, -1)
    for out, x in zip(merge.similar(k, v, dropped), (k, v), strict=True):
        assert torch.equal(out, x)


def ahead(v: Tensor, keep: Tensor, live: Tensor, score: Tensor, **how: int) -> Tensor:
    return merge.ahead(v, v, keep, live, score, None, **{"targets": 3, "seed": 0, **how})[1]


@pytest.mark.parametrize("targets", [1, 3, 32, 100])
def test_ahead(targets):
    _, v, score, live = drawn(2, 2, 63, 4, live=0.8)
    k = torch.randn(2, 2, 63, 3)
    keep = live & (torch.rand(2, 2, 63) < 0.4)
    position = (live.long().cumsum(-1) - 1) * 5
    out_k, out = merge.ahead(k, v, keep, live, score, position, targets=targets, seed=7)
    assert torch.equal(out_k, k)
    uniform = draws(position, 7)
    merged = 0
    for b in range(2):
        for h in range(2):
            right = v[b, h].double()
            for row in (live & ~keep)[b, h].nonzero().flatten().tolist():
                after = [i for i in range(row, 63) if keep[b, h, i]][:targets]
                if not after:
                    continue
                chance = min(1.0, score[b, h, row].item() / score[b, h, after].mean().item())
                if uniform[b, h, row] < chance:
                    merged += 1
                    right[after] += v[b, h, row].double() / len(after)
            torch.testing.assert_close(out[b, h, keep[b, h]], right[keep[b, h]].float())
    assert merged > 20


def test_never_and_always():
    v, keep = torch.randn(1, 2, 40, 4), torch.rand(1, 2, 40) < 0.3
    keep[..., -1] = True
    live = torch.ones_like(keep)
    assert torch.equal(ahead(v, keep, live, torch.where(keep, 1.0, 0.0)), v)
    assert torch.equal(ahead(v, keep, live, torch.full((1, 2, 40), NAN)), v)
    for score in (torch.ones(1, 2, 40), torch.where(keep, 0.0, 1.0)):
        out = ahead(v, keep, live, score)
        torch.testing.assert_close((out * keep[..., None]).sum(2), v.sum(2), rtol=0, atol=1e-5)
    keep[:] = False
    assert torch.equal(ahead(v, keep, live, torch.ones(1, 2, 40)), v)


def test_draws_depend_on_seed_head_and_position_alone():
    _, v, score, live = drawn(2, 3, 50, 4)
    keep = torch.rand(2, 3, 50) < 0.3
    out = ahead(v, keep, live, score)
    assert torch.equal(ahead(v, keep, live, score), out)
    assert not torch.equal(ahead(v, keep, live, score, seed=1), out)
    assert torch.equal(ahead(v[1:], keep[1:], live[1:], score[1:]), out[1:])
    pad = [torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (9, 0)) for x in (keep, live, score)]
    padded = torch.cat((torch.full((2, 3, 9, v.shape[-1]), NAN), v), 2)
    torch.testing.assert_close(ahead(padded, *pad)[:, :, 9:], out, rtol=0, atol=0)
    alike = draws(torch.arange(1000).expand(1, 2, -1), 3)
    assert not torch.equal(alike[0, 0], alike[0, 1])


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40], ids=str)
def test_draws_are_uniform(seed):
    uniform = draws(torch.arange(20000).expand(1, 4, -1), seed)
    assert bool(((uniform >= 0) & (uniform < 1)).all())
    # six standard deviations of a mean of 20000 and of products of neighbours
    assert (uniform.mean(-1) - 0.5).abs().max() < 6 * math.sqrt(1 / 12 / 20000)
    centred = uniform - 0.5
    assert (centred[..., 1:] * centred[..., :-1]).mean(-1).abs().max() < 6 / 12 / math.sqrt(20000)
    assert (centred[:, 0] * centred[:, 1]).mean().abs() < 6 / 12 / math.sqrt(20000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_have_the_dtype_of_the_rows(dtype):
    k, v, score, live = drawn(1, 2, 20, 4)
    k, v = k.to(dtype), v.to(dtype)
    target = merge_sets(k, score, live, 5)
    keep = merge.lead_rows(target)
    wide = k.float(), v.float()
    for name, run in {
        "gaussian": lambda k, v: gaussian(k, v, target),
        "weighted": lambda k, v: merge.weighted(k, v, target, score),
        "similar": lambda k, v: merge.similar(k, v, target),
        "ahead": lambda k, v: merge.ahead(k, v, keep, live, score, None, targets=3, seed=0),
    }.items():
        for out, right in zip(run(k, v), run(*wide), strict=True):
            assert out.dtype == dtype, name
            assert torch.equal(out, right.to(dtype)), name
