"""Spans are equal runs of tokens, disjoint, and none that should be found is missing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvfx.errors import InputError
from kvfx.reuse.align import aligned, nearest_donor
from kvfx.reuse.match import FragmentIndex, Span, hit_rate

Texts = Sequence[Sequence[int]]
texts = st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=3)


def index_of(stored: Texts, window: int = 4, stride: int = 4, **knobs: int) -> FragmentIndex:
    index = FragmentIndex(window, stride, **knobs)
    for number, tokens in enumerate(stored):
        index.add(str(number), tokens)
    return index


def assert_sound(spans: Sequence[Span], tokens: Sequence[int], stored: Texts, least: int) -> None:
    for span in spans:
        there = stored[int(span.sequence)][span.source : span.source + span.length]
        assert list(tokens[span.start : span.end]) == list(there)
        assert span.length == len(there) >= least
    assert all(left.end <= right.start for left, right in pairwise(spans))


def uncovered(spans: Sequence[Span], start: int, stop: int) -> list[int]:
    """Lengths of the runs between start and stop that no span holds."""
    inside = {position for span in spans for position in range(span.start, span.end)}
    runs = [0]
    for position in range(start, stop):
        if position in inside:
            runs.append(0)
        else:
            runs[-1] += 1
    return runs


def brute_force(tokens: Sequence[int], stored: Texts, window: int, stride: int, least: int):
    """(start, length, sequence) of what greed takes from all runs with an indexed window in them,
    round by round.
    """
    runs = []
    for key, text in enumerate(stored):
        for shift in range(-len(text), len(tokens)):
            same = [
                0 <= at - shift < len(text) and tokens[at] == text[at - shift]
                for at in range(len(tokens))
            ]
            at = 0
            while at < len(tokens):
                stop = at
                while stop < len(tokens) and same[stop]:
                    stop += 1
                first = -(-(at - shift) // stride) * stride
                if stop > at and first + window <= stop - shift:
                    runs.append((key, range(at, stop)))
                at = stop + 1
    free, chosen = set(range(len(tokens))), []
    while True:
        pieces = []
        for key, run in runs:
            start = None
            for at in (*run, None):
                if at in free and start is None:
                    start = at
                if at not in free and start is not None:
                    stop = run.stop if at is None else at
                    pieces.append((start - stop, start, key))
                    start = None
        pieces = [piece for piece in pieces if -piece[0] >= least]
        if not pieces:
            return sorted(chosen)
        length, start, key = min(pieces)
        chosen.append((start, -length, str(key)))
        free -= set(range(start, start - length))


# awkward: a run at the end of a run, in a text stored later; a request longer than what repeats
@example([[0] * 23 + [1, 2, 2]], [0] * 24 + [1, 2], 2, 2, 1)
@example([[0] * 20, [1] + [0] * 20 + [1]], [1] + [0] * 22 + [1], 3, 2, 1)
@example([[0, 1, 2] * 8], [2] + [0, 1, 2] * 8 + [0], 2, 1, 2)
@example([[0, 1, 2] * 8], [1, 2] * 3 + [0, 1, 2] * 6 + [2], 4, 4, 3)
@given(texts, st.lists(st.integers(0, 2), max_size=30), *[st.integers(1, 4)] * 2, st.integers(1, 8))
def test_spans_are_those_of_brute_force(stored, tokens, window, stride, least):
    spans = index_of(stored, window, stride).match(tokens, least)
    assert_sound(spans, tokens, stored, least)
    found = [(span.start, span.length, span.sequence) for span in spans]
    assert found == brute_force(tokens, stored, window, stride, least)


@given(st.data())
def test_a_planted_fragment_is_found(data):
    window, stride = (data.draw(st.integers(1, 20)) for _ in range(2))
    least = data.draw(st.integers(1, 40))
    draw = random.Random(data.draw(st.integers(0, 1000)))
    ids = data.draw(st.sampled_from([2, 3, 1000]))
    donor, before, after = ([draw.randrange(ids) for _ in range(200)] for _ in range(3))
    length = data.draw(st.integers(least + stride + window, 110))
    source = data.draw(st.integers(0, len(donor) - length))
    start = data.draw(st.integers(0, 90))
    tokens = before[:start] + donor[source : source + length] + after[:40]
    spans = index_of([donor], window, stride).match(tokens, least)
    assert_sound(spans, tokens, [donor], least)
    # what a longer run leaves of it stays out where it is too short
    assert max(uncovered(spans, start, start + length)) < least
    if ids == 1000:
        assert any(span.start <= start and span.end >= start + length for span in spans)


@given(texts, st.lists(st.integers(0, 2), max_size=30), st.integers(1, 3))
def test_colliding_hashes_change_nothing(stored, tokens, modulus):
    assert index_of(stored, 3, 2, modulus=modulus).match(tokens, 3) == index_of(stored, 3, 2).match(
        tokens, 3
    )


@pytest.mark.parametrize("period", [1, 2, 3, 16, 17])
def test_a_text_that_repeats_itself_has_few_windows(period):
    tokens = [number % period for number in range(5000)]
    index = index_of([tokens], 16, 16)
    assert sum(map(len, index._places.values())) <= 4 * period
    assert index.match(tokens) == (Span(0, 5000, "0", 0),)
    # a stretch that is shorter than the request's, and one that is longer
    assert sum(span.length for span in index.match(tokens * 2)) == 10_000
    (span,) = index.match(tokens[7:4000] + [99] * 40)
    assert (span.start, span.length, (span.source - 7) % period) == (0, 3993, 0)


def test_looking_at_5000_equal_tokens_compares_few_of_them(monkeypatch):
    calls = []
    index = index_of([[7] * 5000, [7] * 4000], 16, 16)
    monkeypatch.setattr("kvfx.reuse.match._longest", lambda limit, agree: calls.append(0) or limit)
    assert index.match([7] * 5000) == (Span(0, 5000, "0", 0),)
    assert len(calls) <= 4


def test_the_longest_span_cuts_those_beside_it():
    first, second = list(range(100, 200)), list(range(160, 300))
    stored = [first, second]
    spans = index_of(stored, 16, 16).match(list(range(100, 300)))
    assert spans == (Span(0, 60, "0", 0), Span(60, 140, "1", 0))
    # 10 tokens are left of the first
    short = index_of([first[50:], second], 16, 16).match(list(range(150, 300)))
    assert short == (Span(10, 140, "1", 0),)


def test_a_span_between_two_longer_ones_keeps_its_middle():
    stored = [range(100), range(80, 180), range(160, 260)]
    spans = index_of([stored[0], stored[2], [*range(82, 178)]], 16, 16).match(range(260))
    assert spans == (Span(0, 100, "0", 0), Span(100, 60, "2", 18), Span(160, 100, "1", 0))


def test_of_equal_spans_the_one_stored_first_is_taken():
    index = index_of([range(50), range(50)], 16, 16)
    assert index.match(range(50))[0].sequence == "0"
    index.add("0", range(50))
    assert index.match(range(50))[0].sequence == "1"


def test_of_equal_spans_the_earlier_one_is_taken_then_the_one_stored_first():
    # what is not at a window of the first is found later than what is at one of the second
    index = index_of([[9, 9, 9, *range(100, 150)], range(100, 150)], 16, 16)
    assert index.match(range(100, 150)) == (Span(0, 50, "0", 3),)
    index = index_of([range(102, 142), [9, 9, 9, *range(100, 140)]], 16, 16)
    assert index.match(range(100, 142), least=20) == (Span(0, 40, "1", 3),)
    # so for what a third leaves of two
    index = index_of([[9, 9, 9, *range(100, 150)], range(100, 160), range(140, 240)], 16, 16)
    assert index.match(range(100, 240)) == (Span(0, 40, "0", 3), Span(40, 100, "2", 0))


def test_windows_that_come_again_are_all_known_where_the_text_between_differs():
    again = list(range(16))
    stored = [[*again, *range(100 * n, 100 * n + 16)] for n in range(1, 9)]
    for middle in range(1, 8):
        fragment = [*stored[middle - 1][-10:], *again, *stored[middle][16:26]]
        (span,) = index_of([[token for part in stored for token in part]], 16, 16).match(fragment)
        assert span == Span(0, 36, "0", 32 * middle - 10)


def test_a_removed_sequence_is_forgotten():
    index = index_of([range(50), range(40)], 16, 16)
    index.remove("0")
    index.remove("never there")
    assert index.match(range(50)) == (Span(0, 40, "1", 0),)
    index.remove("1")
    assert (len(index), index._places) == (0, {})
    assert index.match(range(50)) == ()


def test_least_tokens_and_hit_rate():
    index = index_of([range(100)], 16, 16)
    assert index.match(range(5, 37), least=33) == ()
    spans = index.match([*range(5, 37), 999], least=32)
    assert spans == (Span(0, 32, "0", 5),)
    assert hit_rate(spans, [0] * 33) == 32 / 33
    assert (hit_rate((), []), hit_rate((), [1])) == (0.0, 0.0)
    assert (spans[0].is_prefix, Span(0, 3, "0", 0).is_prefix) == (False, True)


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("stride", -1), ("modulus", 0)])
def test_an_index_needs_positive_numbers(name, value):
    with pytest.raises(InputError, match=rf"{name}={value}"):
        FragmentIndex(**{name: value})


def test_least_is_positive():
    with pytest.raises(InputError, match="least=0"):
        FragmentIndex().match([1], least=0)
    with pytest.raises(InputError, match="least=0"):
        aligned([1], [1], least=0)


@given(*[st.lists(st.integers(0, 3), max_size=40)] * 2, st.integers(1, 9))
def test_aligned_spans_are_equal_and_keep_the_order(tokens, donor, least):
    spans = aligned(tokens, donor, least, sequence="0")
    assert_sound(spans, tokens, [donor], least)
    assert all(a.source + a.length <= b.source for a, b in pairwise(spans))


@pytest.mark.parametrize("length", [1, 8, 100])
def test_identical_texts_are_one_span(length):
    tokens = [number % 7 for number in range(length)]
    assert aligned(tokens, tokens, least=1) == (Span(0, length, "", 0),)


def test_an_edit_is_computed_and_the_rest_moves():
    donor = list(range(100))
    tokens = [*donor[:40], 500, 501, 502, *donor[45:]]
    assert aligned(tokens, donor) == (Span(0, 40, "", 0), Span(43, 55, "", 45))
    assert aligned([*range(200, 210), 3, 4, 5], donor) == ()
    # a token that fills most of a long text is no junk
    filled = [600, *[7] * 120, *range(1000, 1100), 601]
    assert aligned([500, *[7] * 120, 501], filled) == (Span(1, 120, "", 1),)
    # the runs at both ends may not share tokens of the donor
    assert aligned([1, 2, 1, 2, 1], [1, 2, 1], least=1) == (Span(0, 3, "", 0),)


def test_the_nearest_donor_shares_most_pairs_of_tokens():
    tokens = list(range(50))
    stored = {"far": list(range(200, 250)), "near": [*range(48), 7], "reversed": tokens[::-1]}
    assert nearest_donor(tokens, stored) == "near"
    assert nearest_donor(tokens, stored, threshold=0.99) is None
    assert nearest_donor(tokens, {**stored, "same": tokens, "again": tokens}, 1.0) == "again"
    assert nearest_donor([], {"empty": []}) is None
    assert nearest_donor([5], {"one": [5]}) == "one"
    assert nearest_donor([5], {}) is None
