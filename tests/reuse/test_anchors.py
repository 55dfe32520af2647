"""Anchors of a placeholder: who is let in, what is estimated from whom, who has to go."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfx.errors import InputError, PolicyError
from kvfx.reuse.anchors import AnchorPool
from kvfx.reuse.gate import Verdict, nucleus_of, published_nucleus_of
from kvfx.reuse.offsets import Base, Offsets, Published, Relative, blended, weights_of

LAYERS, HEADS, TOKENS, WIDTH, VALUE_WIDTH, PIECE = 3, 2, 7, 5, 3, 4
METRICS = [Published(), Relative(0.05)]
modes = pytest.mark.parametrize("mode", ["canonical", "official"])


def pair(seed: int, tokens: int = TOKENS, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    k = torch.randn(LAYERS, HEADS, tokens, WIDTH, generator=draw, dtype=torch.float64)
    v = torch.randn(LAYERS, HEADS, tokens, VALUE_WIDTH, generator=draw, dtype=torch.float64)
    return k.to(dtype), v.to(dtype)


def base(seed: int, tokens: int = TOKENS, dtype=torch.float32) -> Base:
    return Base(f"text {seed}", *pair(seed, tokens, dtype), "isolated")


def offsets(seed: int, tokens: int = TOKENS, dtype=torch.float32) -> Offsets:
    zeros = (torch.zeros_like(x) for x in pair(seed, tokens, dtype))
    return Offsets.between(pair(1000 + seed, tokens, dtype), tuple(zeros))


def near(other: Base, share: float, seed: int = 99) -> Base:
    """A text whose distance from `other` is about `share` of its size."""
    k, v = pair(seed, other.tokens, other.keys.dtype)
    return Base(f"near {seed}", other.keys + share * k, other.values + share * v, other.kind)


def pool_of(*bases: Base, consumer: str = "b", dtype=torch.float32, **knobs: object) -> AnchorPool:
    pool = AnchorPool(**knobs)
    for number, each in enumerate(bases):
        pool.add(each, consumer, offsets(number, each.tokens, dtype), piece(number, dtype))
    return pool


def piece(seed: int, dtype=torch.float32) -> Offsets:
    return offsets(500 + seed, PIECE, dtype)


def estimated(pool: AnchorPool, text: Base, consumer: str = "b") -> tuple[Tensor, ...]:
    """Keys and values of the slot's and of the piece's offsets, whatever the gate says."""
    verdict = replace(pool.gate(text, consumer), shareable=True)
    slot, behind = pool.estimate(text, consumer, verdict)
    return slot.keys, slot.values, behind.keys, behind.values


def assert_all_close(found, expected, budget: float) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape
        assert float((left - right).abs().max()) <= budget


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_first_layer_has_no_offsets(mode, dtype):
    """KC-2."""
    stored = Offsets.between(pair(1, dtype=dtype), pair(2, dtype=dtype))
    pool = pool_of(*map(base, range(3)), mode=mode)
    noisy = Offsets(*(x.float() + 1 for x in pair(3)))
    pool.add(base(7), "b", noisy, Offsets(*pair(4, PIECE)))
    for found in (stored.keys, stored.values, *estimated(pool, base(0))):
        assert not found[0].any()
        assert found[1:].all()


@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str
)
def test_the_very_text_gives_back_what_its_prompt_computed(dtype, budget):
    """KC-3 and KC-6: whatever else is in the pool."""
    text, real = base(0, dtype=dtype), pair(70, dtype=dtype)
    real_piece, piece_base = pair(71, PIECE, dtype), pair(72, PIECE, dtype)
    real = tuple(
        torch.cat((x[:1], y[1:])) for x, y in zip((text.keys, text.values), real, strict=True)
    )
    pool = pool_of(base(1, dtype=dtype), near(text, 1e-3), dtype=dtype)
    slot = Offsets.between(real, (text.keys, text.values))
    pool.add(text, "b", slot, Offsets.between(real_piece, piece_base))
    verdict = pool.gate(text, "b")
    assert (verdict.shareable, verdict.exact, verdict.nucleus) == (True, True, ("text 0",))
    found, behind = pool.estimate(text, "b", verdict)
    assert_all_close(found.added_to(text.keys, text.values), real, budget)
    moved = behind.added_to(*piece_base)
    assert_all_close([x[1:] for x in moved], [x[1:] for x in real_piece], budget)
    # one such anchor is enough, and its slot's offsets are the stored ones to the bit
    alone = AnchorPool()
    alone.add(text, "b", slot, Offsets.between(real_piece, piece_base))
    again, _ = alone.estimate(text, "b", alone.gate(text, "b"))
    assert torch.equal(again.keys, slot.keys)
    assert torch.equal(again.values, slot.values)


def test_the_official_mode_dilutes_the_very_text():
    """P4: kept, to compare with."""
    text = base(0)
    pool = pool_of(text, base(1), mode="official")
    assert not pool.gate(text, "b").exact
    assert float((estimated(pool, text)[1] - offsets(0).values).abs().max()) > 0.1


@pytest.mark.parametrize("metric", METRICS, ids=repr)
def test_weights_sum_to_one(metric):
    """KC-5."""
    text, others = base(0), [base(1), base(2, 9), near(base(0), 0.1)]
    for measure in (metric.of_tokens, metric.of_channels):
        weights = weights_of([measure(text.keys, each.keys) for each in others], metric.temperature)
        assert torch.allclose(weights.sum(0), torch.ones(()), atol=1e-6)
        assert (weights >= 0).all()


@modes
@given(st.permutations(range(6)))
def test_the_order_of_anchors_changes_nothing(mode, order):
    """KC-5; more anchors than are weighed, and two that are equally far."""
    text = base(0)
    bases = [near(text, 0.1 * (1 + seed // 2), 50 + seed // 2 * 2) for seed in range(6)]
    bases = [replace(each, content=str(number)) for number, each in enumerate(bases)]
    pools = []
    for numbers in (range(6), order):
        pool = AnchorPool(mode=mode, most=3)
        for number in numbers:
            pool.add(bases[number], "b", offsets(number), piece(number))
        pools.append(pool)
    assert_all_close(*(estimated(pool, text) for pool in pools), 1e-5)
    first, second = (pool.gate(text, "b") for pool in pools)
    assert first.entropy == pytest.approx(second.entropy, abs=1e-6)
    assert first.shareable == second.shareable


@modes
def test_a_text_is_one_anchor_however_often_it_comes(mode):
    """KC-5."""
    text, bases = base(0), [near(base(0), 0.1, 50), near(base(0), 0.2, 51)]
    once, twice = pool_of(*bases, mode=mode), pool_of(*bases, mode=mode)
    twice.add(bases[1], "b", offsets(1), piece(1))
    assert len(twice.anchors) == 2
    assert_all_close(estimated(once, text), estimated(twice, text), 0.0)
    # all of them twice under other names
    for number, each in enumerate(bases):
        twice.add(replace(each, content=f"copy {number}"), "b", offsets(number), piece(number))
    assert len(twice.anchors) == 4
    assert_all_close(estimated(once, text), estimated(twice, text), 1e-6)


def test_official_weights_are_those_that_were_published():
    """KC-7: shapes [A, 1, 1, 1, T, 1] and [A, L, 1, K, 1, D], written out again."""
    text, bases = base(0), [base(1), base(2, TOKENS + 2), base(3)]
    pool = pool_of(*bases, mode="official", most=1)
    metric = Published()
    for measure, shape in (
        (metric.of_tokens, (3, 1, 1, 1, TOKENS, 1)),
        (metric.of_channels, (3, LAYERS, 1, HEADS, 1, WIDTH)),
    ):
        found = weights_of([measure(text.keys, each.keys) for each in bases], metric.temperature)
        assert found.shape == shape
    expected = []
    for part in ("keys", "values"):
        x = getattr(text, part)[:, None]
        anchors = [getattr(each, part)[:, None] for each in bases]
        first = torch.stack([each[..., :TOKENS, :] for each in anchors])
        last = torch.stack([each[..., -TOKENS:, :] for each in anchors])
        slot = (-(x - first).abs().mean((1, 2, 3, 5), keepdim=True)).softmax(0)
        behind = (-(x - last).norm(dim=4, keepdim=True)).softmax(0)
        sizes = [each.tokens for each in bases]
        slots = [getattr(offsets(n, size), part)[:, :, :TOKENS] for n, size in enumerate(sizes)]
        pieces = [getattr(piece(n), part) for n in range(3)]
        expected.append((slot[:, :, 0] * torch.stack(slots)).sum(0))
        expected.append((behind[:, :, 0] * torch.stack(pieces)).sum(0))
    slot_k, piece_k, slot_v, piece_v = expected
    assert_all_close(estimated(pool, text), (slot_k, slot_v, piece_k, piece_v), 1e-6)


def test_canonical_weights_are_relative():
    """The same texts in units a thousand times as large have the same weights."""
    text, other = base(0), near(base(0), 0.2)
    for measure in (Relative(0.05).whole, Relative(0.05).of_tokens, Relative(0.05).of_channels):
        small, large = (measure(x * text.keys, x * other.keys) for x in (1, 1000))
        assert torch.allclose(small, large, rtol=1e-4)
        assert 0.1 < float(small.mean()) < 0.3
    assert Relative(0.05).of_channels(text.keys, other.keys).shape == (LAYERS, 1, HEADS, 1, 1)


@pytest.mark.parametrize("metric", METRICS, ids=repr)
def test_slots_compare_beginnings_and_pieces_compare_ends(metric):
    """P6."""
    text = base(0)
    k, _ = pair(9, TOKENS + 3)
    begins = torch.cat((text.keys, k[:, :, :3]), 2)
    ends = torch.cat((k[:, :, :3], text.keys), 2)
    for measure in (metric.whole, metric.of_tokens):
        assert not measure(text.keys, begins).any()
        assert measure(text.keys, ends).all()
    assert not metric.of_channels(text.keys, ends).any()
    assert metric.of_channels(text.keys, begins).all()


def test_a_head_of_zeros_has_weights():
    text = base(0)
    text.keys[1:, 0] = 0
    text.values[1:, 0] = 0
    pool = pool_of(near(text, 0.1, 50), near(text, 0.2, 51))
    assert all(found.isfinite().all() for found in estimated(pool, text))


@modes
def test_fewer_than_two_anchors_are_not_enough(mode):
    """KC-8: none, one, and others that are too short or of another consumer."""
    text, pool = base(0), AnchorPool(mode=mode, gamma=1.0, furthest=9.0)
    for added in (None, base(1), base(2, TOKENS - 1)):
        if added is not None:
            pool.add(added, "b", offsets(1, added.tokens), piece(1))
        verdict = pool.gate(text, "b")
        assert not verdict.shareable
        assert "2 are needed" in verdict.reason
    pool.add(base(3), "c", offsets(3), piece(3))
    assert not pool.gate(text, "b").shareable
    assert "0 of 3 anchors serve d" in pool.gate(text, "d").reason
    pool.add(base(3), "b", offsets(3), piece(3))
    assert pool.gate(text, "b").shareable
    with pytest.raises(InputError, match="nothing to estimate from: 0 of 3 anchors"):
        pool.estimate(text, "d", pool.gate(text, "d"))


def test_longer_anchors_serve_in_paper_lengths_only():
    """P5."""
    text, longer = base(0), [base(1, TOKENS + 1), base(2, TOKENS + 5)]
    strict = pool_of(*longer, gamma=1.0, furthest=9.0)
    assert "0 of 2" in strict.gate(text, "b").reason
    paper = pool_of(*longer, gamma=1.0, furthest=9.0, lengths="paper")
    assert paper.gate(text, "b").shareable
    assert estimated(paper, text)[0].shape == text.keys.shape


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6, unique=True), st.floats(0, 2))
def test_the_largest_gamma_never_refuses(seeds, scale):
    """KC-9; equal distances have the largest entropy there is."""
    text = base(77)
    same = [replace(near(text, scale), content=str(seed)) for seed in seeds]
    for bases in ([near(text, scale, seed) for seed in seeds], same):
        for knobs in ({"mode": "official"}, {"furthest": 99.0}):
            assert pool_of(*bases, gamma=1.0, **knobs).gate(text, "b").shareable


@modes
def test_the_smallest_gamma_allows_one_hot_weights_only(mode):
    """KC-9."""
    text = base(0)
    far = Base("far", text.keys, text.values + 1e4, "isolated")
    pool = pool_of(near(text, 0.1), far, mode=mode, gamma=0.0)
    assert pool.gate(text, "b").entropy == 0.0
    assert pool.gate(text, "b").shareable
    pool.add(near(text, 0.1, 98), "b", offsets(1), piece(1))
    assert "too much alike" in pool.gate(text, "b").reason


@modes
def test_the_entropy_gate_is_closed_above_its_bound(mode):
    text = base(0)
    twins = [replace(near(text, 0.1), content=name) for name in "ab"]
    for gamma, shareable in ((1.0, True), (math.nextafter(1.0, 0.0), False)):
        verdict = pool_of(*twins, mode=mode, gamma=gamma).gate(text, "b")
        assert verdict.entropy == pytest.approx(1.0, abs=1e-6)
        assert verdict.shareable is shareable


def test_the_nearest_anchor_has_to_be_near():
    """P3: the published gate lets anything in whose nearest anchor stands out."""
    text = base(0)
    bases = [near(text, 3.0, 50), near(text, 30.0, 51)]
    assert pool_of(*bases, mode="official").gate(text, "b").shareable
    nearest = min(pool_of(*bases).gate(text, "b").distances)
    assert nearest > 2
    assert pool_of(*bases, furthest=nearest).gate(text, "b").shareable
    verdict = pool_of(*bases, furthest=math.nextafter(nearest, 0.0)).gate(text, "b")
    assert not verdict.shareable
    assert f"{nearest:.3f} away" in verdict.reason


@modes
def test_what_is_not_finite_is_never_shareable(mode):
    """P17."""
    pool = pool_of(base(0), base(1), mode=mode, gamma=1.0, furthest=9.0)
    text = base(0)
    assert pool.gate(text, "b").shareable
    for part, number in (("keys", math.nan), ("values", math.nan), ("values", math.inf)):
        spoilt = replace(text, **{part: torch.full_like(getattr(text, part), number)})
        assert "not finite" in pool.gate(spoilt, "b").reason
        with pytest.raises(InputError, match="not finite"):
            pool.add(replace(spoilt, content="new"), "b", offsets(0), piece(0))
    # squares that no number of fp32 can hold
    huge = Base("huge", text.keys, text.values * 1e30, text.kind)
    assert not pool.gate(huge, "b").shareable
    with pytest.raises(InputError, match="not finite"):
        pool.add(base(5), "b", Offsets(*(x * math.inf for x in pair(1))), piece(0))
    assert len(pool.anchors) == 2


def test_only_the_nearest_are_weighed():
    text = base(0)
    bases = [near(text, 0.2, 50), near(text, 0.1, 51), near(text, 0.3, 52)]
    expected = (offsets(1).keys, offsets(1).values, piece(1).keys, piece(1).values)
    assert_all_close(estimated(pool_of(*bases, most=1), text), expected, 1e-6)
    differ = [estimated(pool_of(*bases, most=most), text)[1] for most in (1, 2, 3)]
    assert all(not torch.equal(left, right) for left, right in pairwise(differ))
    # P4: one that is very near outweighs four others, which it does not as published
    bases = [near(text, 0.01, 50), *map(base, range(1, 5))]
    for metric, least, most in ((Relative(0.05), 0.99, 1.0), (Published(), 0.0, 0.6)):
        distances = [metric.of_tokens(text.values, each.values) for each in bases]
        weights = weights_of(distances, metric.temperature)[0]
        assert least < float(weights.min()) <= float(weights.max()) <= most


def test_sums_of_narrow_offsets_are_wide():
    """P16."""
    narrow, weights = (
        [offsets(n, dtype=torch.bfloat16) for n in range(3)],
        torch.rand(3, 1, 1, 1, 1, 1),
    )
    found = blended(narrow, weights, weights)
    assert found.keys.dtype == found.values.dtype == torch.float32
    expected = sum(
        w * each.values.double() for w, each in zip(weights.flatten(), narrow, strict=True)
    )
    assert float((found.values - expected).abs().max()) < 1e-6
    k, v = found.added_to(*pair(0, dtype=torch.bfloat16))
    assert k.dtype == v.dtype == torch.bfloat16
    assert torch.equal(v, (pair(0, dtype=torch.bfloat16)[1].float() + found.values).bfloat16())


def fill(pool: AnchorPool, hits: tuple[int, ...]) -> None:
    for number, times in enumerate(hits):
        pool.add(base(number), "b", offsets(number), piece(number))
        for _ in range(times):
            pool.count(Verdict(True, "", False, (), (), 0.0, (f"text {number}",)))


@modes
@pytest.mark.parametrize(
    ("hits", "gone"),
    [
        ((5, 0, 3, 1, 4, 0), "text 1"),
        ((5, 2, 3, 1, 4, 0), "text 3"),
        ((2, 2, 2, 2, 2, 0), "text 0"),
        ((5, 2, 3, 2, 4, 0), "text 1"),
    ],
    ids=str,
)
def test_the_least_used_of_the_oldest_has_to_go(mode, hits, gone):
    """KC-10: the sixth is too young to be looked at."""
    pool = AnchorPool(max_anchors=6, window=5, mode=mode)
    fill(pool, hits)
    before = [each.base.content for each in pool.anchors]
    pool.add(base(9), "b", offsets(9), piece(9))
    after = [each.base.content for each in pool.anchors]
    assert after == [*(content for content in before if content != gone), "text 9"]


@given(st.integers(1, 4), st.integers(1, 6), st.lists(st.integers(0, 7), max_size=20))
def test_a_pool_never_holds_more_than_it_may(max_anchors, window, seeds):
    pool = AnchorPool(max_anchors=max_anchors, window=window)
    for seed in seeds:
        pool.add(base(seed), "b", offsets(seed), piece(seed))
        contents = [each.base.content for each in pool.anchors]
        assert len(contents) == len(set(contents)) <= max_anchors
        assert f"text {seed}" in contents


def test_a_known_text_gains_consumers_and_keeps_its_hits():
    pool = AnchorPool(max_anchors=2)
    fill(pool, (3, 0))
    bytes_before = pool.nbytes
    pool.add(base(0), "c", offsets(8), piece(8))
    assert [each.hits for each in pool.anchors] == [3, 0]
    assert set(pool.anchors[0].offsets) == {"b", "c"}
    assert pool.nbytes - bytes_before == offsets(8).nbytes + piece(8).nbytes
    per_token = LAYERS * HEADS * (WIDTH + VALUE_WIDTH) * 4
    assert bytes_before == 2 * per_token * (2 * TOKENS + PIECE)
    pool.add(base(0), "c", offsets(4), piece(4))
    assert torch.equal(estimated(pool, base(0), "c")[0], offsets(4).keys)


def test_a_verdict_is_good_for_the_pool_it_was_given_in():
    text, pool = base(5), AnchorPool(max_anchors=2, gamma=1.0, furthest=9.0)
    fill(pool, (0, 0))
    verdict = pool.gate(text, "b")
    pool.add(base(6), "b", offsets(6), piece(6))
    with pytest.raises(InputError, match="gone since the verdict"):
        pool.estimate(text, "b", verdict)


@pytest.mark.parametrize(
    ("weights", "least", "published"),
    [
        ((0.95, 0.03, 0.02), "a", "abc"),
        ((0.02, 0.5, 0.48), "bc", "b"),
        ((0.25, 0.25, 0.25, 0.25), "abcd", "abc"),
        ((0.3, 0.65, 0.05), "ab", "b"),
    ],
    ids=str,
)
def test_the_nucleus_of_weights(weights, least, published):
    """P11."""
    contents = "abcd"[: len(weights)]
    assert "".join(sorted(nucleus_of(contents, weights))) == least
    assert "".join(sorted(published_nucleus_of(contents, weights))) == published


@pytest.mark.parametrize(
    ("text", "slot", "behind", "reason"),
    [
        (base(1), offsets(1, TOKENS + 1), piece(1), "offsets"),
        (replace(base(1), kind="decoded"), offsets(1), piece(1), "decoded in a pool of isolated"),
        (base(1), offsets(1), offsets(1, PIECE + 1), "5 tokens, and had 4"),
        (replace(base(1, 9), content="text 0"), offsets(1, 9), piece(1), "both called text 0"),
        (base(1), offsets(1), Offsets(*(x[:2] for x in pair(1))), "piece and the base"),
    ],
    ids=["slot", "kind", "piece", "name", "layers"],
)
def test_what_does_not_fit_is_no_anchor(text, slot, behind, reason):
    """P9 among others."""
    pool = pool_of(base(0))
    with pytest.raises(InputError, match=reason):
        pool.add(text, "b", slot, behind)
    assert len(pool.anchors) == 1


def test_a_base_of_another_kind_is_not_compared():
    pool = pool_of(base(0), base(1), gamma=1.0, furthest=9.0)
    assert "0 of 2" in pool.gate(replace(base(0), kind="decoded"), "b").reason


def test_shapes_of_texts_and_offsets():
    k, v = pair(0)
    for keys, values in ((k[0], v[0]), (k, v[:, :, 1:])):
        with pytest.raises(InputError, match=r"are not \[L, K, T, D\]"):
            Base("a", keys, values, "isolated")
        with pytest.raises(InputError, match=r"are not \[L, K, T, D\]"):
            Offsets(keys, values)
    for keys, values in ((k[:1], v[:1]), (k[:, :, :0], v[:, :, :0])):
        with pytest.raises(InputError, match="offsets need 2 layers and 1 token"):
            Base("a", keys, values, "isolated")
    with pytest.raises(InputError, match="offsets between"):
        Offsets.between((k, v), (k[:, :, 1:], v[:, :, 1:]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_anchors", 0),
        ("window", 0),
        ("most", 0),
        ("mode", "paper"),
        ("lengths", "any"),
        ("gamma", -0.1),
        ("gamma", 1.1),
        ("gamma", math.nan),
        ("temperature", 0.0),
        ("furthest", math.nan),
    ],
)
def test_knobs_have_ranges(name, value):
    with pytest.raises(PolicyError, match=name):
        AnchorPool(**{name: value})
