"""Planning: sums, bounds and nesting of budgets, and searches against all choices there are."""

from __future__ import annotations

import heapq
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvfx.budgets.cake import cake_shares
from kvfx.budgets.joint import joint_choice, joint_errors
from kvfx.budgets.knapsack import cheapest_errors, pareto
from kvfx.budgets.marginal import best_fractions, dynamic_shares, xkv_shares
from kvfx.budgets.meda import meda_shares
from kvfx.budgets.precision import EXACT, PAIRS, tuned_pairs
from kvfx.budgets.prefix import bisected_counts, prefix_counts, retained_before
from kvfx.budgets.pyramid import pyramid_shares
from kvfx.budgets.retention import (
    bisected_shares,
    equal_retention,
    mass_fractions,
    prefix_shares,
    whole_curves,
)
from kvfx.budgets.rounding import largest_remainder, share_entries, whole_shares
from kvfx.budgets.shares import mean_one
from kvfx.budgets.squeeze import clusters, squeeze_shares
from kvfx.budgets.uncomp import stages, uncomp_shares
from kvfx.errors import CalibrationError

MANY = settings(max_examples=200)
SHARES = st.lists(
    st.one_of(st.floats(0, 3), st.sampled_from([0.0, 1.0, 1e-9, 50.0])), min_size=1, max_size=9
)
# few distinct values, so that there are ties, and scores that saturate fp32
SCORES = st.lists(
    st.lists(st.sampled_from([0.0, 1e-12, 1.0, 2.0, 3.0, 1e9]), min_size=1, max_size=11),
    min_size=1,
    max_size=5,
)
LAYERS, STEPS = 5, 16


def one_by_one(shares, total, floors, caps):
    """Webster's rule as it reads, in fractions."""
    weights, count = whole_shares(shares), list(floors)

    def turn(layer):
        return Fraction(2 * count[layer] + 1, weights[layer]), layer

    heap = [turn(layer) for layer in range(len(shares)) if count[layer] < caps[layer]]
    heapq.heapify(heap)
    while sum(count) < total:
        _, layer = heapq.heappop(heap)
        count[layer] += 1
        if count[layer] < caps[layer]:
            heapq.heappush(heap, turn(layer))
    return tuple(count)


@st.composite
def divisions(draw):
    shares = draw(SHARES)
    caps = [draw(st.integers(0, 40)) for _ in shares]
    floors = [draw(st.integers(0, min(cap, 6))) for cap in caps]
    return shares, draw(st.integers(sum(floors), sum(caps))), floors, caps


@MANY
@given(divisions())
def test_largest_remainder_is_websters_rule(division):
    shares, total, floors, caps = division
    count = largest_remainder(shares, total, floors, caps)
    assert sum(count) == total
    assert all(low <= n <= high for low, n, high in zip(floors, count, caps, strict=True))
    assert count == one_by_one(shares, total, floors, caps)


@MANY
@given(divisions())
def test_a_larger_total_takes_from_nobody(division):
    shares, total, floors, caps = division
    less = largest_remainder(shares, total, floors, caps)
    more = largest_remainder(shares, total + 1, floors, caps)
    assert all(a <= b for a, b in zip(less, more, strict=True))


def test_totals_beyond_the_bounds_are_met_as_far_as_they_go():
    assert largest_remainder([1.0, 2.0], 100, 1, [3, 4]) == (3, 4)
    assert largest_remainder([1.0, 2.0], 0, [2, 1], 9) == (2, 1)
    # a cap is stronger than a floor
    assert largest_remainder([1.0, 1.0], 8, 5, [2, 9]) == (2, 6)


def test_what_a_cap_gives_back_goes_to_the_others():
    assert largest_remainder([8.0, 1.0, 1.0], 30, 0, [10, 30, 30]) == (10, 10, 10)


def test_equal_turns_go_by_order_whatever_rounding_says():
    """(2 * 7 + 1) / 3 = (2 * 2 + 1) / 1: the first layer is next, though the start has the last."""
    shares, caps = [3.0, 7.0, 9.0, 6.0, 1.0], [27, 11, 21, 15, 12]
    assert largest_remainder(shares, 57, [2, 2, 3, 1, 1], caps) == (8, 11, 21, 15, 2)


def test_no_paradox_of_remainders():
    """Hamilton's rule gives (2, 4, 4) of 10 and (1, 5, 5) of 11."""
    shares = [1.5 / 10, 4.2 / 10, 4.3 / 10]
    ten, eleven = (largest_remainder(shares, total, 0, 99) for total in (10, 11))
    assert all(a <= b for a, b in zip(ten, eleven, strict=True))


@given(st.permutations(range(6)))
def test_permuted_layers_have_permuted_counts(order):
    shares = [0.3, 1.7, 0.9, 0.45, 2.1, 0.55]
    count = largest_remainder(shares, 101, 2, 30)
    assert largest_remainder([shares[i] for i in order], 101, 2, 30) == tuple(
        count[i] for i in order
    )


def test_many_layers_and_long_prompts():
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(128, generator=generator).tolist()
    total = 128 * 131072 // 4
    count = largest_remainder(shares, total, 4, 131072)
    assert sum(count) == total
    exact = [share / sum(shares) * total for share in shares]
    assert max(abs(a - b) for a, b in zip(count, exact, strict=True)) < 1.5


@MANY
@given(
    SHARES,
    st.integers(0, 60),
    st.floats(0.01, 1.0),
    st.integers(0, 80),
    st.integers(0, 9),
    st.integers(1, 9),
)
def test_shares_of_layers_add_up_to_uniform_budgets(
    shares, tokens, fraction, entries, protected, least
):
    count = share_entries(tokens, fraction, entries, protected, least, shares)
    each = max(entries or math.ceil(tokens * fraction), least)
    assert sum(count) == each * len(shares)
    assert all(min(max(protected, least), each) <= n <= max(tokens, each) for n in count)
    assert share_entries(tokens, fraction, entries, protected, least, [1.0] * 3) == (each,) * 3
    # nested in the budget
    more = share_entries(tokens, min(1.0, 1.2 * fraction), entries, protected, least, shares)
    assert all(a <= b for a, b in zip(count, more, strict=True))


def layers_of(scores):
    return [torch.tensor(score, dtype=torch.float64) for score in scores]


@MANY
@given(SCORES, st.integers(0, 60), st.integers(0, 3))
def test_prefix_search_properties(scores, total, least):
    scores = layers_of(scores)
    sizes = [len(score) for score in scores]
    count = prefix_counts(scores, total, least)
    # sums are exact (P1), everything is everything (P9)
    assert sum(count) == min(total, sum(sizes))
    assert prefix_counts(scores, sum(sizes), least) == tuple(sizes)
    # nobody loses an entry when the total grows (P5)
    assert all(a <= b for a, b in zip(count, prefix_counts(scores, total + 1, least), strict=True))
    if total >= sum(min(least, size) for size in sizes):
        assert all(n >= min(least, size) for n, size in zip(count, sizes, strict=True))
    # no entry of one layer instead of another's raises the least retention (P2)
    before = [retained_before(score, least) for score in scores]
    last = [float(r[n - 1]) for r, n in zip(before, count, strict=True) if n > 0]
    following = [float(r[n]) for r, n in zip(before, count, strict=True) if n < len(r)]
    assert max(last, default=-1.0) <= min(following, default=2.0)
    # the scale of a layer does not matter (P6)
    scaled = [score * 4.0**layer for layer, score in enumerate(scores)]
    assert prefix_counts(scaled, total, least) == count
    # the published search finds the same, and always ends
    assert bisected_counts(scores, total, least, tolerance=5) == count


@MANY
@given(SCORES, st.integers(1, 50))
def test_equal_layers_differ_by_one_entry(scores, total):
    """P3, also where the score is spent before the total is."""
    layer = layers_of(scores)[0]
    count = prefix_counts([layer] * 4, total, 0)
    assert max(count) - min(count) <= 1


def test_a_layer_with_one_score_keeps_one():
    """P4, and a layer without any keeps as little."""
    one_hot = torch.zeros(50, dtype=torch.float64)
    one_hot[7] = 3.0
    others = torch.linspace(1, 2, 50, dtype=torch.float64)
    count = prefix_counts([one_hot, others, torch.zeros_like(others)], 50, 0)
    assert count == (1, 48, 1)
    assert prefix_counts([one_hot, others, torch.zeros_like(others)], 54, 0) == (2, 50, 2)


def published(curves, total, rounds=200):
    """Prefixes [L] by the published loop over cumulative priorities, or None where it never
    ends.
    """
    low, high = 0.0, 1.0
    for _ in range(rounds):
        threshold = torch.tensor((low + high) / 2, dtype=curves[0].dtype)
        count = [min(int(torch.searchsorted(p, threshold)) + 1, len(p)) for p in curves]
        if abs(sum(count) - total) < 5:
            return tuple(count)
        low, high = (float(threshold), high) if sum(count) < total else (low, float(threshold))
    return None


@pytest.mark.parametrize("part", [0.02, 0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("power", [1, 4, 12])
def test_searches_equal_the_published_one_where_it_ends(part, power):
    """P7."""
    scores = [torch.rand(n, dtype=torch.float64) ** power for n in (300, 257, 300, 64)]
    curves = [s.sort(descending=True).values.cumsum(0) / s.sum() for s in scores]
    found = published(curves, int(part * 921))
    assert found is not None
    assert prefix_counts(scores, sum(found), 0) == found
    total = int(part * 921)
    assert bisected_counts(scores, total, 0, 5) == prefix_counts(scores, total, 0)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.6])
def test_shares_by_halving_are_those_of_the_exact_search(fraction):
    """To within the tokens at which the published search stops."""
    found = curves(prompts=1, layers=4, steps=128)
    exact, halved = prefix_shares(found, fraction), bisected_shares(found, fraction, 1000)
    counts = [[share * fraction * 1000 for share in shares] for shares in (exact, halved)]
    assert counts[1] == pytest.approx(counts[0], abs=2.5)
    assert bisected_shares(torch.ones(1, 4, 128), 0.3, 1000) == pytest.approx((1.0,) * 4)


ADVERSARIAL = {
    "uniform": torch.ones(4, 1000, dtype=torch.float64),
    "one-hot": torch.eye(4, 1000, dtype=torch.float64),
    # what fp32 sums no longer see
    "saturated": torch.logspace(0, -30, 1000, dtype=torch.float64).expand(4, -1).contiguous(),
    "nothing": torch.zeros(4, 1000, dtype=torch.float64),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_searches_end_where_the_published_one_does_not(name):
    scores = ADVERSARIAL[name]
    curves = list(
        scores.float().sort(descending=True).values.cumsum(1) / scores.float().sum(1)[:, None]
    )
    stuck = [total for total in (7, 2006, 3590) if published(curves, total) is None]
    assert stuck or name == "uniform"
    for total in (0, 1, 7, 1999, 2006, 3590, 4000):
        count = prefix_counts(list(scores), total, 0)
        assert sum(count) == total
        assert max(count) - min(count) <= 1
        assert bisected_counts(list(scores), total, 0, 5) == count
        assert bisected_counts(list(scores), total, 0, 1) == count


def test_the_published_search_steps_over_plateaus():
    """Eight equal layers: sizes grow eight at a time."""
    curves = [torch.ones(100, dtype=torch.float64).cumsum(0) / 100] * 12
    assert published(curves, 606) is None
    assert sum(bisected_counts([torch.ones(100)] * 12, 606, 0, 5)) == 606


def curves(prompts=2, layers=LAYERS, steps=STEPS, power=4.0):
    """Random concave curves [P, L, G]."""
    mass = torch.rand(prompts, layers, steps, dtype=torch.float64) ** power
    mass = mass * torch.rand(prompts, layers, 1, dtype=torch.float64).sqrt() + 1e-3
    mass = mass.sort(-1, descending=True).values
    return mass.cumsum(-1) / mass.sum(-1, keepdim=True)


CURVES = {
    "random": curves(),
    "uniform": torch.linspace(1 / STEPS, 1, STEPS).expand(2, LAYERS, -1),
    "one-hot": torch.ones(2, LAYERS, STEPS),
    "mixed": torch.cat([curves(layers=2), torch.ones(2, LAYERS - 2, STEPS)], 1),
    "saturated": curves().mul(1.1).clamp(max=1.0).float(),
    "nothing": torch.zeros(2, LAYERS, STEPS),
}


@pytest.mark.parametrize("name", CURVES)
def test_equal_retention(name):
    given_curves = CURVES[name][0]
    last = torch.zeros(LAYERS, dtype=torch.float64)
    whole = whole_curves(given_curves)
    for fraction in (0.01, 0.1, 0.33, 0.5, 0.8, 0.97, 1.0):
        kept = equal_retention(given_curves, fraction)
        assert float(kept.mean()) == pytest.approx(fraction, abs=1e-12)
        assert bool((kept >= last - 1e-12).all())
        assert float(kept.max()) <= 1.0
        # the curves are equally high there, or have reached their top
        at = kept * STEPS
        left = at.floor().long().clamp(max=STEPS - 1)[:, None]
        start, end = whole.gather(1, left)[:, 0], whole.gather(1, left + 1)[:, 0]
        height = start + (end - start) * (at - left[:, 0])
        assert float(height.max() - height.min()) < 1e-9
        last = kept
    assert bool((last == 1.0).all())


def test_equal_retention_is_the_limit_of_the_exact_search():
    """Curves of many tokens, one step per token."""
    scores = torch.rand(4, 400, dtype=torch.float64) ** torch.tensor([[1.0], [3.0], [9.0], [27.0]])
    given_curves = scores.sort(1, descending=True).values.cumsum(1) / scores.sum(1, keepdim=True)
    for fraction in (0.1, 0.3, 0.7):
        count = prefix_counts(list(scores), int(fraction * 1600), 0)
        kept = equal_retention(given_curves, fraction) * 400
        assert max(abs(a - b) for a, b in zip(count, kept.tolist(), strict=True)) <= 1.0


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
def test_prefix_shares_are_means_over_prompts(fraction):
    given_curves = curves(prompts=3)
    shares = prefix_shares(given_curves, fraction)
    assert sum(shares) == pytest.approx(LAYERS)
    wanted = torch.stack([equal_retention(c, fraction) for c in given_curves]).mean(0) / fraction
    assert shares == pytest.approx(wanted.tolist())
    order = [3, 0, 4, 1, 2]
    assert prefix_shares(given_curves[:, order], fraction) == pytest.approx(
        [shares[i] for i in order]
    )
    assert prefix_shares(given_curves, 1.0) == pytest.approx((1.0,) * LAYERS)


def test_rounded_prefix_budgets_are_nested_up_to_one_entry():
    """Shares change with the fraction, and whole numbers cannot follow any better."""
    given_curves = curves(prompts=3)
    last = (0,) * LAYERS
    for fraction in torch.linspace(0.02, 1.0, 99, dtype=torch.float64).tolist():
        shares = prefix_shares(given_curves, fraction)
        count = share_entries(100, fraction, 0, 0, 1, shares)
        assert sum(count) == LAYERS * math.ceil(100 * fraction)
        assert all(a <= b + 1 for a, b in zip(last, count, strict=True))
        last = count
    assert last == (100,) * LAYERS


def test_mass_fractions():
    uniform = torch.linspace(1 / STEPS, 1, STEPS)
    one_hot = torch.ones(STEPS)
    found = mass_fractions(torch.stack([uniform, one_hot])[None], 0.9)
    assert found == pytest.approx((0.9, 0.9 / STEPS), rel=1e-5)
    given_curves = curves()
    low, high = mass_fractions(given_curves, 0.8), mass_fractions(given_curves, 0.95)
    assert all(a < b for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize("cells", [1, 5, 9, 14])
def test_best_fractions_equal_brute_force(cells):
    """Whole steps: what greedy gains retain is the most that any choice does."""
    steps = 5
    given_curves = curves(prompts=1, layers=3, steps=steps)[0]
    kept = best_fractions(given_curves, cells / (3 * steps), torch.ones(3)) * steps
    choice = tuple(round(n) for n in kept.tolist())
    assert kept.tolist() == pytest.approx(choice)
    full = torch.nn.functional.pad(given_curves, (1, 0))

    def retained(counts):
        return sum(float(full[layer, n]) for layer, n in enumerate(counts))

    options = [c for c in itertools.product(range(steps + 1), repeat=3) if sum(c) == cells]
    assert choice == max(options, key=retained)


def test_best_fractions_are_nested_and_capped():
    given_curves, last = curves()[0], torch.zeros(LAYERS, dtype=torch.float64)
    for fraction in (0.05, 0.2, 0.5, 0.7):
        kept = best_fractions(given_curves, fraction, torch.full((LAYERS,), 0.83))
        assert float(kept.mean()) == pytest.approx(fraction)
        assert float(kept.max()) <= 0.83 + 1e-9
        assert bool((kept >= last - 1e-9).all())
        last = kept


def test_equal_layers_share_evenly():
    """Whatever the signal: no allocator prefers a layer by its place."""
    same = curves(layers=1).expand(-1, LAYERS, -1)
    number = torch.rand(2, 1).expand(-1, LAYERS)
    even = pytest.approx((1.0,) * LAYERS)
    assert prefix_shares(same, 0.3) == even
    assert xkv_shares(same, 0.3) == even
    assert dynamic_shares(same, 0.3, most=10.0) == even
    assert cake_shares(number, number, 1.6, 0.4) == even
    assert meda_shares(number, 1.0) == even
    assert uncomp_shares(number, 1.0) == even
    assert squeeze_shares(number, 3, 0.35) == even
    assert pyramid_shares(LAYERS, 1.0, 0.3) == even


def test_shares_follow_permuted_layers():
    order = [3, 0, 4, 1, 2]
    given_curves, first, second = curves(), torch.rand(2, LAYERS), torch.rand(2, LAYERS)
    for shares, permuted in (
        (xkv_shares(given_curves, 0.3), xkv_shares(given_curves[:, order], 0.3)),
        (dynamic_shares(given_curves, 0.3, 2.0), dynamic_shares(given_curves[:, order], 0.3, 2.0)),
        (
            cake_shares(first, second, 2.0, 3.0),
            cake_shares(first[:, order], second[:, order], 2.0, 3.0),
        ),
        (meda_shares(first, 0.5), meda_shares(first[:, order], 0.5)),
        (squeeze_shares(first, 3, 0.3), squeeze_shares(first[:, order], 3, 0.3)),
    ):
        assert sum(shares) == pytest.approx(LAYERS)
        assert permuted == pytest.approx([shares[i] for i in order])
        assert max(shares) > min(shares)


def test_dynamic_shares_are_capped_and_count_prompts_alike():
    # half the tokens of the first layer, against any of the others
    steep = torch.linspace(1 / STEPS, 1, STEPS).repeat(1, LAYERS, 1)
    steep[0, 0] = (2 * steep[0, 0]).clamp(max=1.0)
    assert dynamic_shares(steep, 0.1, most=10.0) == pytest.approx((5.0, 0.0, 0.0, 0.0, 0.0))
    assert dynamic_shares(steep, 0.1, most=1.5) == pytest.approx((1.5, *(0.875,) * 4))
    given_curves = curves(prompts=3)
    single = [dynamic_shares(c[None], 0.1, most=10.0) for c in given_curves]
    mean = [sum(column) / 3 for column in zip(*single, strict=True)]
    assert dynamic_shares(given_curves, 0.1, most=10.0) == pytest.approx(mean)


def test_pyramid():
    shares = pyramid_shares(32, 20.0, 0.03)
    # the published budget of 120 past tokens: 234 in the first layer, min = 120 / 20 in the last
    assert [120 * shares[0], 120 * shares[-1]] == pytest.approx([234.0, 6.0])
    assert sum(shares) == pytest.approx(32)
    assert all(a - b == pytest.approx(shares[0] - shares[1]) for a, b in itertools.pairwise(shares))
    # no layer can keep more than there is: max = T - W, min = 2 * base - max
    assert pyramid_shares(3, 20.0, 0.8) == pytest.approx((1.25, 1.0, 0.75))
    assert pyramid_shares(3, 20.0, 1.0) == (1.0, 1.0, 1.0)
    assert pyramid_shares(1, 20.0, 0.1) == (1.0,)
    past = largest_remainder(shares, 32 * 120, 0, 4088)
    assert sum(past) == 32 * 120
    assert list(past) == sorted(past, reverse=True)


def test_cake():
    entropy, variance = torch.tensor([[1.0, 4.0]]), torch.tensor([[9.0, 1.0]])
    # sqrt(1) * 9 : sqrt(4) * 1
    assert cake_shares(entropy, variance, 2.0, 1.0) == pytest.approx((18 / 11, 4 / 11))
    # only proportions count
    assert cake_shares(entropy * 7, variance * 3, 2.0, 1.0) == pytest.approx((18 / 11, 4 / 11))


def test_meda():
    shares = meda_shares(torch.tensor([[0.0, math.log(3.0)]]), 1.0)
    assert shares == pytest.approx((0.5, 1.5))
    assert meda_shares(torch.tensor([[0.0, math.log(9.0)]]), 2.0) == pytest.approx((0.5, 1.5))


def test_uncomp_stages():
    entropy = torch.tensor([5.0, 5.5, 4.4, 4.6, 2.0])
    assert stages(entropy, 1.0) == (0, 0, 1, 1, 2)
    shares = uncomp_shares(entropy[None], 1.0)
    assert shares == pytest.approx([x / 4.3 for x in (5.25, 5.25, 4.5, 4.5, 2.0)])
    assert uncomp_shares(entropy[None], 9.0) == pytest.approx((1.0,) * 5)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8), st.integers(1, 4))
def test_clusters_equal_brute_force(values, groups):
    def distance(parts):
        return sum(sum((x - sum(p) / len(p)) ** 2 for x in p) for p in parts if p)

    found = clusters([float(x) for x in values], groups)
    assert sorted(set(found)) == list(range(min(groups, len(set(values)))))
    ranked = sorted(zip(values, found, strict=True))
    assert [group for _, group in ranked] == sorted(found)
    best = min(
        distance(
            [[x for x, g in zip(values, choice, strict=True) if g == n] for n in range(groups)]
        )
        for choice in itertools.product(range(groups), repeat=len(values))
    )
    parts = [[x for x, g in zip(values, found, strict=True) if g == n] for n in range(groups)]
    assert distance(parts) == pytest.approx(best)


def test_squeeze():
    similarity = torch.tensor([[0.1, 0.98, 0.5, 0.97, 0.12]])
    shares = squeeze_shares(similarity, 3, 0.35)
    assert shares == pytest.approx((1.43333, 0.35, 1.43333, 0.35, 1.43333), rel=1e-4)
    assert sum(shares) == pytest.approx(5)


def test_weights_of_layers():
    assert mean_one(torch.tensor([[1.0, 3.0], [30.0, 10.0]])) == pytest.approx((1.0, 1.0))
    assert mean_one(torch.tensor([[0.0, 0.0], [1.0, 3.0]])) == pytest.approx((0.75, 1.25))
    assert mean_one(torch.tensor([[1e-300, 3e-300]], dtype=torch.float64)) == (0.5, 1.5)
    for wrong in (float("nan"), -1.0, float("inf")):
        with pytest.raises(CalibrationError, match="must be finite and not negative"):
            mean_one(torch.tensor([[1.0, wrong]]))


def brute_force(errors, costs, limit):
    """The least error of all choices within a limit."""
    found = [
        sum(row[option] for row, option in zip(errors, choice, strict=True))
        for choice in itertools.product(*(range(len(row)) for row in errors))
        if sum(row[option] for row, option in zip(costs, choice, strict=True)) <= limit
    ]
    return min(found) if found else None


OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=4, max_size=4),
    min_size=1,
    max_size=4,
)


@MANY
@given(OPTIONS, st.integers(0, 50))
def test_the_knapsack_equals_brute_force(options, limit):
    errors = [[float(e) for e, _ in row] for row in options]
    costs = [[c for _, c in row] for row in options]
    best = brute_force(errors, costs, limit)
    given_costs = torch.tensor(costs)
    if best is None:
        with pytest.raises(CalibrationError, match=f"the limit is {limit}"):
            cheapest_errors(torch.tensor(errors), given_costs, limit, 1000)
        return
    chosen = cheapest_errors(torch.tensor(errors), given_costs, limit, 1000)
    assert sum(row[o] for row, o in zip(costs, chosen, strict=True)) <= limit
    assert sum(row[o] for row, o in zip(errors, chosen, strict=True)) == best


@MANY
@given(OPTIONS, st.integers(0, 50))
def test_a_coarse_grid_stays_within_the_limit(options, limit):
    """Rounding costs up never overspends, and leaves nothing that one layer could use."""
    errors = [[float(e) for e, _ in row] for row in options]
    costs = [[c for _, c in row] for row in options]
    assume(sum(map(min, costs)) <= limit)
    chosen = cheapest_errors(torch.tensor(errors), torch.tensor(costs), limit, 5)
    left = limit - sum(row[o] for row, o in zip(costs, chosen, strict=True))
    assert left >= 0
    for row, price, option in zip(errors, costs, chosen, strict=True):
        better = [p for e, p in zip(row, price, strict=True) if e < row[option]]
        assert all(p - price[option] > left for p in better)


def test_pareto():
    assert pareto([3.0, 1.0, 2.0, 1.0, 5.0], [1, 4, 4, 9, 0]) == (4, 0, 1)
    assert pareto([1.0, 1.0], [2, 2]) == (0,)


@pytest.mark.parametrize("bits", [2.0, 3.25, 4.5, 8.0])
@pytest.mark.parametrize("power", [1, 2])
def test_tuned_pairs_equal_brute_force(bits, power):
    error = torch.rand(2, 4, 9, dtype=torch.float64)
    pairs = ((8, 4), (4, 4), (4, 2), (2, 2))
    chosen = tuned_pairs(error, bits, pairs=pairs, exact=(), power=power)
    mean = (error**power).mean(0)
    table = [[float(row[PAIRS.index(pair)]) for pair in pairs] for row in mean]
    best = brute_force(table, [[k + v for k, v in pairs]] * 4, 2 * bits * 4)
    assert sum(k + v for k, v in chosen) <= 2 * bits * 4
    found = sum(float(row[PAIRS.index(pair)]) for row, pair in zip(mean, chosen, strict=True))
    assert found == pytest.approx(best)


def test_exact_layers_count():
    error = torch.rand(1, 6, 9)
    chosen = tuned_pairs(error, 7.0, pairs=PAIRS, exact=(0, 5), power=2)
    assert chosen[0] == chosen[5] == EXACT
    assert sum(k + v for k, v in chosen) <= 7 * 2 * 6
    with pytest.raises(CalibrationError, match="raise it"):
        tuned_pairs(error, 3.0, pairs=PAIRS, exact=(0, 5), power=2)
    assert tuned_pairs(error, 3.0, pairs=PAIRS, exact=range(6), power=2) == (EXACT,) * 6


def test_where_keys_matter_they_get_the_bits():
    error = torch.tensor([[[8 / k + 1 / v for k, v in PAIRS]] * 3])
    assert tuned_pairs(error, 3.0, pairs=PAIRS, exact=(), power=1) == ((4, 2),) * 3


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 1.0])
def test_joint_choice_equals_brute_force(part):
    eviction, quantization = torch.rand(2, 3, 3), torch.rand(2, 3, 2)
    errors = joint_errors(eviction, quantization)
    assert errors[1, 2, 0] == pytest.approx(
        float((eviction[:, 1, 2] ** 2).mean() + (quantization[:, 1, 0] ** 2).mean()), rel=1e-6
    )
    sizes = torch.randint(1, 100, (3, 3, 2)) * 8
    flat = sizes.flatten(1)
    low, high = int(flat.amin(1).sum()), int(flat.amax(1).sum())
    limit = low + int(part * (high - low))
    chosen = joint_choice(errors, sizes, limit)
    found = sum(float(errors[layer, e, q]) for layer, (e, q) in enumerate(chosen))
    assert sum(int(sizes[layer, e, q]) for layer, (e, q) in enumerate(chosen)) <= limit
    best = brute_force(errors.flatten(1).tolist(), flat.tolist(), limit)
    assert found == pytest.approx(best)


def test_joint_choice_of_a_large_model():
    """Bytes that are no multiples of anything: near what the same search finds on a finer grid."""
    layers = 40
    eviction = torch.rand(2, layers, 7).sort(-1, descending=True).values
    errors = joint_errors(eviction, torch.rand(2, layers, 10).sort(-1).values)
    sizes = torch.arange(1, 8)[:, None] * torch.arange(10, 0, -1) * 1234577 + torch.randint(
        999, (layers, 7, 10)
    )
    limit = int(sizes.double().mean() * layers)
    chosen = joint_choice(errors, sizes, limit)
    rows = range(layers)
    spent = sum(int(sizes[layer, e, q]) for layer, (e, q) in zip(rows, chosen, strict=True))
    assert limit * 0.99 <= spent <= limit
    found = sum(float(errors[layer, e, q]) for layer, (e, q) in zip(rows, chosen, strict=True))
    fine = cheapest_errors(errors.flatten(1), sizes.flatten(1), limit, 1 << 16)
    best = sum(float(row[option]) for row, option in zip(errors.flatten(1), fine, strict=True))
    assert found <= best * 1.005
