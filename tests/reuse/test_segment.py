"""A segment says what it is, cuts into segments, and refuses parts that do not fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfx.errors import InputError
from kvfx.reuse.segment import (
    DECODED,
    EXACT_PREFIX,
    ISOLATED,
    REPAIRED,
    Segment,
    Stored,
    context_hash,
    provenance_class,
)

TOKENS = (5, 7, 5, 9, 11)
BEHIND = context_hash([1, 2])


def segment(provenance=EXACT_PREFIX, context="", depth=0, tokens=TOKENS):
    keys = tuple(torch.randn(2, len(tokens), width) for width in (3, 7))
    values = tuple(torch.randn(2, len(tokens), width) for width in (5, 1))
    return Segment(tokens, keys, values, provenance, context, depth)


@given(st.lists(st.integers(0, 2**40), max_size=9), st.integers(0, 9))
def test_a_context_has_one_hash_however_it_is_cut(tokens, cut):
    whole = context_hash(tokens)
    assert whole == context_hash(tokens[cut:], context_hash(tokens[:cut]))
    assert (whole == "") == (tokens == [])


def test_contexts_differ():
    contexts = ([], [1], [11], [1, 1], [1, 11], [11, 1], [111])
    assert len({context_hash(tokens) for tokens in contexts}) == len(contexts)


def test_a_slice_is_views_behind_what_was_cut_off():
    whole = segment(context=BEHIND)
    part = whole.slice(1, 4)
    part.check()
    assert part.tokens == TOKENS[1:4]
    assert part.context == context_hash([1, 2, 5])
    assert part.provenance == EXACT_PREFIX
    for found, tensor in zip(part.keys + part.values, whole.keys + whole.values, strict=True):
        assert torch.equal(found, tensor[:, 1:4])
        assert found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_the_rest_of_an_isolated_segment_is_not_isolated():
    whole = segment(ISOLATED)
    first, rest = whole.slice(0, 2), whole.slice(2, 5)
    assert (first.provenance, first.context) == (ISOLATED, "")
    assert (rest.provenance, rest.context) == (EXACT_PREFIX, context_hash(TOKENS[:2]))
    rest.check()


def test_a_slice_of_approximate_rows_is_as_approximate():
    part = segment(REPAIRED, BEHIND, 3).slice(2, 3)
    assert (part.provenance, part.depth) == (REPAIRED, 3)


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (-1, 2), (2, 2), (3, 1)])
def test_a_slice_outside_is_refused(start, stop):
    with pytest.raises(InputError, match="5 tokens"):
        segment().slice(start, stop)


def test_a_stored_copy_shares_nothing():
    whole = segment()
    part = whole.slice(1, 4)
    copy = part.stored()
    for tensor in (*whole.keys, *whole.values):
        tensor.zero_()
    assert all(tensor.is_contiguous() for tensor in copy.keys + copy.values)
    assert all(tensor.abs().min() > 0 for tensor in copy.keys + copy.values)
    turned = replace(whole, keys=tuple(k.mT.contiguous().mT for k in whole.keys))
    assert not turned.keys[0].is_contiguous()
    assert all(k.is_contiguous() for k in turned.stored().keys)
    assert sum(t.untyped_storage().nbytes() for t in copy.keys + copy.values) == copy.nbytes


def test_bytes_and_form():
    whole = segment()
    assert whole.nbytes == 2 * 5 * (3 + 7 + 5 + 1) * 4
    assert whole.form == ((2, 3, 5, torch.float32), (2, 7, 1, torch.float32))
    assert Stored.of("k", whole) == Stored("k", TOKENS, EXACT_PREFIX, "", 0, whole.nbytes)


def test_only_isolated_and_exact_are_one_class():
    kinds = (EXACT_PREFIX, ISOLATED, DECODED, REPAIRED)
    classes = [provenance_class(kind) for kind in kinds]
    assert classes == [EXACT_PREFIX, EXACT_PREFIX, DECODED, REPAIRED]


@pytest.mark.parametrize(
    ("provenance", "context", "depth"),
    [
        (EXACT_PREFIX, "", 0),
        (EXACT_PREFIX, BEHIND, 0),
        (ISOLATED, "", 0),
        (DECODED, BEHIND, 0),
        (DECODED, BEHIND, 2),
        (REPAIRED, BEHIND, 1),
    ],
)
def test_what_there_can_be(provenance, context, depth):
    segment(provenance, context, depth).check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"provenance": "exact"}, "none of exact-prefix, isolated, decoded, repaired"),
        ({"depth": 1}, "depth 1 was made from approximate"),
        ({"provenance": ISOLATED, "depth": 1}, "depth 1 was made from approximate"),
        ({"provenance": REPAIRED}, "repaired segment cannot have depth 0"),
        ({"provenance": DECODED, "depth": -1}, "decoded segment cannot have depth -1"),
        ({"provenance": ISOLATED, "context": BEHIND}, "behind a context is not isolated"),
        ({"context": "../../etc"}, "not what context_hash gives"),
        ({"tokens": ()}, "0 tokens"),
        ({"tokens": (1, 2)}, r"segment of 2 tokens has keys \[2, 5, 3\]"),
        ({"tokens": (1, 2, 3, 4, -5)}, "-5 is no token id"),
        ({"tokens": (1, 2, 3, 4, 5.0)}, "5.0 is no token id"),
        ({"keys": ()}, "keys of 0 sites"),
        ({"keys": (torch.ones(2, 5, 3),)}, "keys of 1 sites and values of 2"),
        ({"keys": (torch.ones(2, 5, 3), torch.ones(1, 5, 7))}, r"site 1 .* keys \[1, 5, 7\]"),
        ({"keys": (torch.ones(2, 5, 3), torch.ones(2, 5, 0))}, r"site 1 .* keys \[2, 5, 0\]"),
        ({"keys": (torch.ones(1, 2, 5, 3), torch.ones(2, 5, 7))}, r"site 0 .* \[1, 2, 5, 3\]"),
        ({"keys": (torch.ones(2, 5, 3), torch.ones(2, 5, 7).half())}, "site 1 .*torch.float16"),
        ({"keys": (torch.ones(2, 5, 3).int(), torch.ones(2, 5, 7))}, "site 0 .*torch.int32"),
    ],
)
def test_what_does_not_fit_is_named(changes, reason):
    with pytest.raises(InputError, match=reason):
        replace(segment(), **changes).check()
