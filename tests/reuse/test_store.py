"""What is put into a store comes out bit for bit, as what it is, within the budgets, or not."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfx.errors import InputError, StoreError
from kvfx.reuse.fingerprint import Fingerprint
from kvfx.reuse.segment import (
    DECODED,
    EXACT_PREFIX,
    ISOLATED,
    PROVENANCES,
    REPAIRED,
    Segment,
    Stored,
    context_hash,
)
from kvfx.reuse.store import SegmentStore

MODEL = Fingerprint("w", "t", "c", "r", "float32")
OTHER = Fingerprint("w2", "t", "c", "r", "float32")
BEHIND = context_hash([1, 2])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def segment(tokens, provenance=EXACT_PREFIX, context="", depth=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, len(tokens), width, generator=generator) for width in (3, 5))
    return Segment(tuple(tokens), (k,), (v,), provenance, context, depth)


def tensors(segment):
    return (*segment.keys, *segment.values)


def assert_same(found, expected):
    assert found is not None
    for name in ("tokens", "provenance", "context", "depth"):
        assert getattr(found, name) == getattr(expected, name)
    for first, second in zip(tensors(found), tensors(expected), strict=True):
        assert first.dtype == second.dtype
        assert first.shape == second.shape
        # bits: a NaN and a negative zero too
        assert first.contiguous().view(torch.uint8).equal(second.contiguous().view(torch.uint8))


def four(first):
    """Four tokens, other ones for every `first`."""
    return tuple(range(10 * first, 10 * first + 4))


@pytest.fixture(params=["memory", "disk", "both"])
def store(request, tmp_path):
    folder = None if request.param == "memory" else tmp_path
    return SegmentStore(MODEL, memory=1 if request.param == "disk" else "1MiB", folder=folder)


@st.composite
def any_segment(draw):
    """Any number of sites, each with its own widths, of any bits."""
    tokens = tuple(draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5)))
    dtype, heads = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3))
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    parts = tuple(
        tuple(
            torch.randint(0, 256, (heads, len(tokens), dtype.itemsize * width), generator=generator)
            .to(torch.uint8)
            .view(dtype)
            for width in widths
        )
        for widths in draw(st.lists(sizes, min_size=1, max_size=11))
    )
    provenance = draw(st.sampled_from(PROVENANCES))
    context = "" if provenance == ISOLATED else context_hash([seed])
    keys, values = zip(*parts, strict=True)
    return Segment(tokens, keys, values, provenance, context, int(provenance == REPAIRED))


@given(any_segment(), st.booleans())
def test_put_and_get_are_bit_exact(given_segment, on_disk):
    with TemporaryDirectory() as folder:
        store = SegmentStore(MODEL, memory=1 if on_disk else "1MiB", folder=folder)
        key = store.put(given_segment)
        assert (store.nbytes == 0) == on_disk
        found = store.get(
            given_segment.tokens,
            provenance=given_segment.provenance,
            context=given_segment.context,
        )
        assert_same(found, given_segment)
        assert_same(SegmentStore(MODEL, folder=folder).load(key), given_segment)


def test_views_come_out_as_they_were_put(store):
    part = segment(four(1)).slice(1, 3)
    expected = part.stored()
    store.put(part)
    for tensor in tensors(part):
        tensor.zero_()
    assert_same(store.get(part.tokens, context=part.context), expected)


def test_what_is_not_there_is_a_miss(store):
    store.put(segment(four(1)))
    assert store.get(four(2)) is None
    assert store.get(four(1)[:3]) is None
    assert store.get(four(1), context=BEHIND) is None
    assert store.get(()) is None
    assert store.get(four(1)) is not None
    assert (store.stats.hits, store.stats.misses) == (1, 4)


@pytest.mark.parametrize("provenance", [DECODED, REPAIRED])
@pytest.mark.parametrize("context", ["", BEHIND])
def test_approximate_is_no_answer_to_an_exact_question(store, provenance, context):
    approximate = segment(four(1), provenance, context, 1)
    store.put(approximate)
    for exact in (EXACT_PREFIX, ISOLATED):
        assert store.get(four(1), provenance=exact, context=context) is None
    assert store.find_prefix(four(1)) is None
    assert_same(store.get(four(1), provenance=provenance, context=context), approximate)
    assert_same(store.get(four(1), context=context), approximate)


def test_the_most_exact_comes_first(store):
    for provenance, depth in ((REPAIRED, 1), (DECODED, 0), (EXACT_PREFIX, 0)):
        store.put(segment(four(1), provenance, BEHIND, depth))
        assert store.get(four(1), context=BEHIND).provenance == provenance
    for provenance in (REPAIRED, DECODED, EXACT_PREFIX):
        found = store.get(four(1), provenance=provenance, context=BEHIND)
        assert found.provenance == provenance


def test_isolated_is_the_exact_prefix_of_what_starts_with_it(store):
    store.put(segment(four(1), ISOLATED))
    assert store.get(four(1), provenance=EXACT_PREFIX) is not None
    assert store.find_prefix((*four(1), 5)) is not None
    assert store.get(four(1), provenance=EXACT_PREFIX, context=BEHIND) is None


def test_the_longest_prefix(store):
    tokens = tuple(range(9))
    for length in (2, 6, 4):
        store.put(segment(tokens[:length], seed=length))
    store.put(segment((*tokens[:6], 99)))
    store.put(segment(tokens[:8], EXACT_PREFIX, BEHIND))
    store.put(segment(tokens[:8], REPAIRED, "", 1))
    assert [len(store.find_prefix(tokens[:n]).tokens) for n in (9, 6, 5, 4, 2)] == [6, 6, 4, 4, 2]
    assert_same(store.find_prefix(tokens), segment(tokens[:6], seed=6))
    assert store.find_prefix(tokens[:1]) is None
    assert store.find_prefix((0, 2, 3)) is None


def test_what_is_nearer_to_exact_stays(store):
    for depth, seed in ((3, 1), (2, 2), (4, 3), (2, 4)):
        store.put(segment(four(1), DECODED, BEHIND, depth, seed))
    assert_same(store.get(four(1), context=BEHIND), segment(four(1), DECODED, BEHIND, 2, 2))
    assert [stored.depth for stored in store.segments()] == [2]


def test_segments_lists_both_tiers(store):
    first, second = segment(four(1)), segment(four(2)[:3], DECODED, BEHIND, 2)
    keys = [store.put(first), store.put(second)]
    expected = [Stored.of(key, s) for key, s in zip(keys, (first, second), strict=True)]
    assert sorted(store.segments(), key=lambda s: s.tokens) == expected


def test_remove_and_clear(store):
    keys = [store.put(segment(four(i))) for i in range(3)]
    store.remove(keys[1])
    store.remove(keys[1])
    assert store.load(keys[1]) is None
    assert {stored.key for stored in store.segments()} == {keys[0], keys[2]}
    store.clear()
    assert store.segments() == []
    assert (store.nbytes, store.disk_nbytes) == (0, 0)
    assert store.load(keys[0]) is None


def test_models_and_tenants_in_one_folder_do_not_meet(tmp_path):
    owners = [(MODEL, ""), (MODEL, "a"), (MODEL, "b"), (OTHER, ""), (OTHER, "a")]
    stores = [SegmentStore(model, folder=tmp_path, salt=salt) for model, salt in owners]
    keys = set()
    for seed, store in enumerate(stores):
        assert store.get(four(1)) is None
        assert store.find_prefix(four(1)) is None
        assert store.segments() == []
        keys.add(store.put(segment(four(1), seed=seed)))
    assert len(keys) == len(owners)
    for seed, (model, salt) in enumerate(owners):
        again = SegmentStore(model, folder=tmp_path, salt=salt)
        assert_same(again.get(four(1)), segment(four(1), seed=seed))
        assert all(again.load(key) is None for key in keys - {again.segments()[0].key})
    stores[0].clear()
    assert SegmentStore(MODEL, folder=tmp_path).segments() == []
    assert len(stores[1].segments()) == 1


def test_the_salt_is_not_on_the_disk(tmp_path):
    store = SegmentStore(MODEL, folder=tmp_path, salt="grandmother")
    key = store.put(segment(four(1)))
    for path in tmp_path.rglob("*"):
        assert b"grandmother" not in str(path).encode() + (
            path.read_bytes() if path.is_file() else b""
        )
    assert "grandmother" not in key


def test_another_form_is_of_another_model(tmp_path):
    store = SegmentStore(MODEL, folder=tmp_path)
    store.put(segment(four(1)))
    other = segment(four(2))
    wider = Segment(other.tokens, other.values, other.values, EXACT_PREFIX, "", 0)
    with pytest.raises(StoreError, match="another model"):
        store.put(wider)
    assert store.get(four(2)) is None
    # a file of the other form, from a process that did not know better
    SegmentStore(MODEL, folder=tmp_path).put(wider)
    assert store.get(four(2)) is None
    assert "widths" in store.stats.reasons[0]


@pytest.mark.parametrize(
    "key", ["", "a" * 63, "A" * 64, "../" + "a" * 61, f"{'a' * 64}\n", "é" * 64]
)
def test_what_is_no_key_is_refused(store, key):
    for call in (store.load, store.remove):
        with pytest.raises(InputError, match="no key"):
            call(key)


def test_questions_that_mean_nothing_are_refused(store):
    with pytest.raises(InputError, match="none of exact-prefix"):
        store.get(four(1), provenance="exact")
    for tokens in ([0.5], [2**63], ["a"]):
        with pytest.raises(InputError, match="token ids"):
            store.get(tokens)
    with pytest.raises(InputError, match="memory=0"):
        SegmentStore(MODEL, memory=0)
    with pytest.raises(InputError, match="disk="):
        SegmentStore(MODEL, disk="much")
    with pytest.raises(InputError, match="isolated"):
        store.put(segment(four(1), ISOLATED, BEHIND))
