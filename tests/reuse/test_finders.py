"""What finders find and remember: exact prefixes, pieces, fragments, and nothing else."""

from __future__ import annotations

import pytest
import torch

from kvfx.reuse import Layout, SegmentStore
from kvfx.reuse.finders import DEEPEST, FragmentFinder, Outcome, PieceFinder, alone, cast_segment
from kvfx.reuse.segment import EXACT_PREFIX, ISOLATED, REPAIRED, context_hash


@pytest.fixture
def store(fast):
    return SegmentStore.of(fast)


@pytest.fixture
def parts(some):
    """Four pieces of 13, 12, 11, 10 tokens, and a question."""
    return [some(count, seed) for seed, count in enumerate((13, 12, 11, 10, 5), 1)]


@pytest.fixture
def computed(runner):
    """What became of a prompt of which nothing was found."""

    def computed(layout: Layout, depth: int = 0) -> Outcome:
        rows = runner.rows(len(layout.tokens))
        runner.dense(rows, layout.tokens[:-1])
        return Outcome(layout, rows, (), len(layout.tokens) - 1, depth)

    return computed


def facts(found):
    return [(each.start, each.stop, each.exact) for each in found]


def same_rows(runner, layout, each, within: float = 2e-5) -> bool:
    """Whether rows are those that the whole prompt computes."""
    rows = runner.rows(len(layout.tokens))
    runner.dense(rows, layout.tokens)
    keys, values = runner.canonical(rows, each.start, each.stop)
    pairs = zip((*each.segment.keys, *each.segment.values), (*keys, *values), strict=True)
    return all((x - y).abs().max() <= within * y.abs().max() for x, y in pairs)


def pieces_of(store, runner, exact: bool) -> PieceFinder:
    return PieceFinder(store, runner, exact=exact)


def fragments_of(store, runner, **knobs) -> FragmentFinder:
    return FragmentFinder(store, runner, **{"least": 6, "window": 4, "similar": False, **knobs})


def test_a_segment_is_what_was_computed_alone(runner, parts):
    segment = alone(runner, parts[0])
    segment.check()
    assert (segment.tokens, segment.provenance, segment.context) == (parts[0], ISOLATED, "")
    assert segment.keys[0].dtype == segment.values[0].dtype == torch.float64
    rows = runner.rows(13)
    runner.dense(rows, parts[0])
    pair = runner.canonical(rows, 0, 13)
    again = cast_segment(runner, parts[0], pair, EXACT_PREFIX, "", 0)
    assert all(torch.equal(x, y) for x, y in zip(segment.values, again.values, strict=True))


def test_exact_pieces_are_found_behind_their_context(store, runner, parts, computed):
    finder = pieces_of(store, runner, exact=True)
    a, b, c, _, question = parts
    layout = Layout((a, b, c, question))
    assert finder.find(layout) == ()
    finder.learn(computed(layout))
    found = finder.find(layout)
    assert facts(found) == [(0, 13, True), (13, 25, True), (25, 36, True)]
    assert all(same_rows(runner, layout, each) for each in found)
    assert [each.segment.context for each in found] == [
        "", context_hash(a), context_hash(b, context_hash(a))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ((0, 1, 2), [0, 1, 2]),
        ((0, 1, 3), [0, 1]),
        ((0, 2, 1), [0]),
        ((1, 0, 2), []),
        ((1, 2), []),
        ((2, 1, 0), []),
    ],
    ids=str,
)
def test_exact_pieces_behind_another_context_are_not_found(
    order, expected, store, runner, parts, computed
):
    finder = pieces_of(store, runner, exact=True)
    finder.learn(computed(Layout((*parts[:3], parts[4]))))
    layout = Layout((*(parts[number] for number in order), parts[4]))
    found = finder.find(layout)
    assert [each.segment.tokens for each in found] == [parts[number] for number in expected]
    assert finder.missing(layout) == (
        *(parts[number] for number in order if number not in expected), parts[4]
    )  # fmt: skip


def test_contexts_are_the_same_however_they_are_cut(store, runner, parts, computed):
    finder = pieces_of(store, runner, exact=True)
    finder.learn(computed(Layout((*parts[:3], parts[4]))))
    whole = Layout((parts[0] + parts[1], parts[2], parts[4]))
    assert facts(finder.find(whole)) == [(25, 36, True)]


def test_the_last_piece_is_never_stored(store, runner, parts, computed):
    for exact in (True, False):
        finder = pieces_of(store, runner, exact)
        finder.learn(computed(Layout((parts[0], parts[1]))))
        assert [each.tokens for each in store.segments()] == [parts[0]]
        finder.learn(computed(Layout((parts[1],))))
        assert len(store.segments()) == 1


def test_approximate_rows_are_no_exact_prefix(store, runner, parts, computed):
    """KC-12."""
    finder = pieces_of(store, runner, exact=True)
    finder.learn(computed(Layout((*parts[:3], parts[4])), depth=1))
    assert store.segments() == []


def test_pieces_are_found_anywhere_as_they_are_alone(store, runner, parts, computed):
    finder = pieces_of(store, runner, exact=False)
    a, b, c, d, question = parts
    finder.learn(computed(Layout((a, b, c, question))))
    assert {each.provenance for each in store.segments()} == {ISOLATED}
    layout = Layout((c, d, a, question))
    assert finder.missing(layout) == (d, question)
    found = finder.find(layout)
    assert facts(found) == [(0, 11, True), (21, 34, False)]
    assert same_rows(runner, layout, found[0])
    assert not same_rows(runner, layout, found[1], 1e-2)
    assert same_rows(runner, Layout((a, question)), type(found[1])(0, found[1].segment, True))


def test_exact_pieces_are_preferred_while_all_before_is_exact(store, runner, parts, computed):
    a, b, c, d, question = parts
    layout = Layout((a, b, c, question))
    pieces_of(store, runner, exact=True).learn(computed(layout))
    finder = pieces_of(store, runner, exact=False)
    assert facts(finder.find(layout)) == [(0, 13, True), (13, 25, True), (25, 36, True)]
    for piece in (b, c, d):
        store.put(alone(runner, piece))
    assert facts(finder.find(layout)) == [(0, 13, True), (13, 25, True), (25, 36, True)]
    # behind a piece that is not exact, nothing is
    assert facts(finder.find(Layout((b, a, c, question)))) == [
        (0, 12, True), (12, 25, False), (25, 36, False)
    ]  # fmt: skip


def test_fragments_are_found_where_they_stand_now(store, runner, parts, computed):
    finder = fragments_of(store, runner)
    a, b, c, d, question = parts
    assert finder.find(Layout((a, b, question))) == ()
    finder.learn(computed(Layout((a, b, c, question))))
    layout = Layout((d, b, c, question))
    (each,) = finder.find(layout)
    # what is asked was the same, but for its last token, which is not in the body
    assert (each.start, each.stop, each.exact) == (10, 37, False)
    assert each.segment.tokens == (*b, *c, *question[:-1])
    assert same_rows(runner, Layout((a, b, c, question)), type(each)(13, each.segment, True))
    assert finder.missing(layout) == (d, question[-1:])


def test_a_prefix_of_an_exact_prompt_is_exact(store, runner, parts, computed):
    finder = fragments_of(store, runner)
    a, b, c, d, question = parts
    finder.learn(computed(Layout((a, b, question))))
    layout = Layout((a, b[:5], d, question))
    found = finder.find(layout)
    assert facts(found) == [(0, 18, True)]
    assert same_rows(runner, layout, found[0])
    del c


def test_a_prefix_of_a_repaired_prompt_is_not_exact(store, runner, parts, computed):
    """KC-12: nor is it given to who asks for exact rows."""
    finder = fragments_of(store, runner)
    layout = Layout((*parts[:2], parts[4]))
    finder.learn(computed(layout, depth=1))
    assert [each.provenance for each in store.segments()] == [REPAIRED]
    assert facts(finder.find(layout)) == [(0, 29, False)]
    assert store.find_prefix(layout.tokens) is None
    assert pieces_of(store, runner, exact=True).find(Layout((layout.tokens[:-1], (5,)))) == ()


def test_prompts_without_a_new_fragment_are_not_stored(store, runner, parts, computed):
    finder = fragments_of(store, runner, least=14)
    finder.learn(computed(Layout((parts[0],))))
    assert store.segments() == []
    finder.learn(computed(Layout((parts[0], parts[4][:2]))))
    assert len(store.segments()) == 1


def test_rows_that_were_reused_often_are_not_stored(store, runner, parts, computed):
    finder = fragments_of(store, runner)
    finder.learn(computed(Layout((parts[0], parts[4])), depth=DEEPEST + 1))
    assert store.segments() == []
    finder.learn(computed(Layout((parts[0], parts[4])), depth=DEEPEST))
    assert [each.depth for each in store.segments()] == [DEEPEST]


def test_a_finder_knows_what_was_stored_before_it(store, runner, parts, computed):
    layout = Layout((*parts[:2], parts[4]))
    fragments_of(store, runner).learn(computed(layout))
    assert facts(fragments_of(store, runner).find(layout)) == [(0, 29, True)]


def test_segments_behind_a_context_are_no_donors(store, runner, parts, computed):
    pieces_of(store, runner, exact=True).learn(computed(Layout((*parts[:3], parts[4]))))
    finder = fragments_of(store, runner)
    assert next(iter(finder.known.values())).tokens == parts[0]
    assert len(finder.known) == 1


def test_what_was_evicted_is_forgotten(store, runner, parts, computed):
    """Two fragments of one sequence that is gone."""
    finder = fragments_of(store, runner)
    a, b, c, d, question = parts
    finder.learn(computed(Layout((a, b, c, question))))
    layout = Layout((c, d, a, question))
    assert len(finder.find(layout)) == 2
    store.clear()
    assert finder.find(layout) == ()
    assert finder.missing(layout) == (layout.tokens,)
    assert len(finder.index) == len(finder.known) == 0
    finder.learn(computed(layout))
    assert facts(finder.find(layout)) == [(0, 38, True)]


def test_one_similar_prompt_is_aligned(store, runner, parts, some, computed):
    finder = fragments_of(store, runner, similar=True)
    a, b, c, d, question = parts
    finder.learn(computed(Layout((a, b, c, question))))
    finder.learn(computed(Layout((d, question))))
    changed = (*a, 7, *b[1:])
    layout = Layout((changed, c, question))
    found = finder.find(layout)
    # one token is another one, and one more stands in front of it
    assert facts(found) == [(0, 13, True), (14, 40, False)]
    # in another order only one run is left
    assert facts(finder.find(Layout((c, b, a, question)))) == [(23, 36, False)]
    assert finder.find(Layout((some(36, 9), question))) == ()
