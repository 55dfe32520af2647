"""The budgets room: what the device finds is what Python finds one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfx.budgets import rounding
from kvfx.budgets.prefix import prefix_counts
from kvfx.kernels.budgets.reference import (
    allocate_dbudget,
    allocate_mass,
    allocate_prefix,
    apportion,
    share_entries,
    whole_mass,
    whole_shares,
)

MANY = settings(max_examples=150)
SHARES = st.lists(
    st.one_of(st.floats(0, 3), st.sampled_from([0.0, 1.0, 1e-9, 50.0])), min_size=1, max_size=9
)


@pytest.mark.parametrize("kind", ["any", "few", "steep", "alike"])
@pytest.mark.parametrize("layers", [1, 2, 7, 30, 128])
def test_device_and_host_divide_alike(layers, kind):
    """Thousands of divisions in all, each row with bounds of its own."""
    rows = 200
    generator = torch.Generator().manual_seed(layers)
    random = torch.rand(layers, generator=generator, dtype=torch.float64)
    shares = {
        "any": random,
        "few": (random * 3).floor(),
        "steep": random**12 * 1e6,
        "alike": torch.ones_like(random),
    }[kind].tolist()
    most = torch.randint(0, 5000, (rows, layers), generator=generator)
    least = torch.minimum(torch.randint(0, 90, (rows, layers), generator=generator), most)
    part = torch.rand(rows, generator=generator, dtype=torch.float64)
    total = (least.sum(1) + part * (most - least).sum(1)).long()
    found = apportion(total, torch.tensor(whole_shares(shares)), least, most)
    for counts, *given_row in zip(found, total, least, most, strict=True):
        wanted = rounding.largest_remainder(shares, *(x.tolist() for x in given_row))
        assert tuple(counts.tolist()) == wanted


@MANY
@given(
    SHARES,
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.floats(0.01, 1.0),
    st.integers(0, 80),
    st.integers(0, 9),
    st.integers(1, 9),
)
def test_share_entries(shares, tokens, fraction, entries, protected, least):
    knobs = (fraction, entries, protected, least)
    for layer in range(len(shares)):
        found = share_entries(torch.tensor(tokens), 3, *knobs, shares, layer)
        wanted = [rounding.share_entries(n, *knobs, shares)[layer] for n in tokens]
        assert found.tolist() == [[n] * 3 for n in wanted]


def test_shares_of_long_prompts():
    shares = [0.3, 1.9, 0.8]
    for tokens in (131072, 1 << 20):
        found = [
            int(share_entries(torch.tensor([tokens]), 1, 0.25, 0, 4, 8, shares, layer))
            for layer in range(3)
        ]
        assert sum(found) == 3 * math.ceil(tokens / 4)
        assert tuple(found) == rounding.share_entries(tokens, 0.25, 0, 4, 8, shares)


def padded(rows: int, lengths: list[int]) -> torch.Tensor:
    """Live rows [B, T] behind padding."""
    return torch.arange(rows) >= rows - torch.tensor(lengths)[:, None]


SIGNALS = {
    "random": lambda x: x**4,
    "ties": lambda x: (x * 3).floor(),
    "uniform": torch.ones_like,
    "nothing": torch.zeros_like,
    "one-hot": lambda x: (x == x.amax(-1, keepdim=True)).float(),
    # what fp32 sums no longer see
    "saturated": lambda x: torch.where(x == x.amax(-1, keepdim=True), 1e12, x),
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(
    "knobs", [(0, 0, 0.0, 0), (1, 2, 0.0, 1), (2, 1, 0.25, 9), (4, 60, 0.0, 1)], ids=str
)
def test_prefixes_are_those_of_the_host(knobs, signal):
    sinks, recent, share, least = knobs
    layers, rows, lengths = 5, 63, [63, 40, 7, 1, 0, 63]
    live = padded(rows, lengths)
    score = SIGNALS[signal](torch.rand(layers, 6, rows))
    for part in (0.0, 0.1, 0.37, 0.9, 1.0, 1.5):
        total = torch.tensor([int(part * layers * n) for n in lengths])
        count = allocate_prefix(score.masked_fill(~live, math.nan), live, total, *knobs)
        assert count.shape == (6, layers)
        for b, n in enumerate(lengths):
            newest = recent + math.floor(int(total[b]) // layers * share)
            alive = score[:, b, rows - n :].double()
            free = [i for i in range(n) if sinks <= i < n - newest]
            held = n - len(free)
            assert int(count[b].sum()) == min(int(total[b]), layers * n)
            if int(total[b]) < held * layers:
                # protected rows in their order, one layer after the other
                assert int(count[b].max() - count[b].min()) <= 1
                continue
            left = int(total[b]) - held * layers
            own = prefix_counts(list(alive[:, free]), left, max(least - held, 0))
            assert count[b].tolist() == [held + n for n in own]


def test_prefixes_are_nested_and_do_not_see_padding():
    score = torch.rand(4, 2, 50) ** 3
    live = torch.ones(2, 50, dtype=torch.bool)
    wide = torch.cat([torch.full((4, 2, 13), torch.nan), score], 2)
    alive = torch.cat([torch.zeros(2, 13, dtype=torch.bool), live], 1)
    last = torch.zeros(2, 4, dtype=torch.int64)
    for total in range(0, 201, 7):
        totals = torch.tensor([total, 200 - total])
        count = allocate_prefix(score, live, totals, 1, 2, 0.0, 3)
        assert torch.equal(count, allocate_prefix(wide, alive, totals, 1, 2, 0.0, 3))
        flipped = allocate_prefix(score.flip(1), live, totals.flip(0), 1, 2, 0.0, 3)
        assert torch.equal(count, flipped.flip(0))
        assert bool((count[0] >= last[0]).all())
        last = count


def test_prefixes_keep_what_matters():
    score = torch.tensor([[[8.0, 1, 1]], [[4.0, 3, 3]]])
    live = torch.ones(1, 3, dtype=torch.bool)
    assert allocate_prefix(score, live, torch.tensor([4]), 0, 0, 0.0, 0).tolist() == [[1, 3]]


def fewest(score: list[float], protected: int, threshold: float) -> int:
    """How many scores, the first `protected` and then the largest, hold a part of their sum."""
    order = score[:protected] + sorted(score[protected:], reverse=True)
    for count in range(protected, len(order) + 1):
        if math.fsum(order[:count]) >= threshold * math.fsum(order):
            return count
    raise AssertionError


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.975, 1.0])
@pytest.mark.parametrize(("sinks", "recent", "least"), [(0, 0, 1), (1, 2, 1), (0, 0, 12)], ids=str)
def test_allocate_mass(sinks, recent, least, threshold):
    lengths, rows = [50, 31, 5, 1], 50
    live = padded(rows, lengths)
    # whole numbers, so that Python's sums are the same
    score = torch.randint(1, 1000, (4, 3, rows)).float()
    given_live = live[:, None].expand(-1, 3, -1)
    count = allocate_mass(
        score.masked_fill(~given_live, math.nan), given_live, threshold, sinks, recent, least
    )
    for b, n in enumerate(lengths):
        mass = score[b, :, rows - n :].sum(0).tolist()
        first, last = mass[:sinks], mass[max(n - recent, min(sinks, n)) :] if recent else []
        middle = mass[len(first) : n - len(last)]
        wanted = fewest(first + last + middle, len(first) + len(last), threshold)
        assert count[b].tolist() == [min(max(wanted, least), n)] * 3


def test_mass_of_a_whole_threshold_needs_every_row_that_has_some():
    live = torch.ones(1, 1, 6, dtype=torch.bool)
    score = torch.tensor([[[0.0, 3.0, 0.0, 1.0, 1.0, 0.0]]])
    assert allocate_mass(score, live, 1.0, 0, 0, 1).tolist() == [[3]]
    assert allocate_mass(score, live, 0.6, 0, 0, 1).tolist() == [[1]]
    assert allocate_mass(torch.zeros(1, 1, 6), live, 0.9, 0, 0, 1).tolist() == [[6]]


def ranked_back(score: list[float], sinks: int, threshold: float) -> int:
    """DBudgetKV as it reads: first rows, then from the last backwards."""
    order = score[:sinks] + score[sinks:][::-1]
    norm = math.sqrt(math.fsum(a * a for a in order))
    for count in range(1, len(order) + 1):
        if 1 - math.sqrt(math.fsum(a * a for a in order[:count])) / norm < threshold:
            return max(count, min(sinks, len(order)))
    return len(order)


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("sinks", [0, 4])
def test_allocate_dbudget(sinks, threshold):
    lengths, rows = [64, 33, 3, 1], 64
    live = padded(rows, lengths)[:, None].expand(-1, 2, -1)
    score = torch.rand(4, 2, rows) ** 6
    count = allocate_dbudget(score.masked_fill(~live, math.nan), live, threshold, sinks)
    for b, n in enumerate(lengths):
        wanted = [ranked_back(row[rows - n :].tolist(), sinks, threshold) for row in score[b]]
        assert count[b].tolist() == wanted


def test_dbudget_reaches_back_to_what_matters():
    live = torch.ones(1, 1, 20, dtype=torch.bool)
    for at, wanted in ((13, 4 + 7), (2, 4), (19, 5)):
        one_hot = torch.zeros(1, 1, 20)
        one_hot[..., at] = 0.7
        assert allocate_dbudget(one_hot, live, 0.01, 4).tolist() == [[wanted]]
    # nothing may be lost, or there is nothing to tell by
    assert allocate_dbudget(torch.rand(1, 1, 20) + 0.1, live, 0.0, 4).tolist() == [[20]]
    assert allocate_dbudget(torch.zeros(1, 1, 20), live, 0.01, 4).tolist() == [[20]]


def test_whole_mass():
    score = torch.tensor([[math.nan, -1.0, 0.0, 1.0, 0.25, 7.0]])
    live = torch.tensor([[True, True, True, True, True, False]])
    assert whole_mass(score, live).tolist() == [[0, 0, 0, 1 << 44, 1 << 42, 0]]
    assert whole_mass(torch.full((1, 3), math.nan), live[:, :3]).tolist() == [[0, 0, 0]]
