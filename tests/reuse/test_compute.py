"""Which rows of a prompt are computed: KS-1 to KS-3 of specs/reuse.md, and what programs get."""

from __future__ import annotations

import pytest

from kvfx import EPIC, CacheBlend, ExactPrefix, KVShare, NaiveReuse
from kvfx.reuse.compute import compute
from kvfx.reuse.finders import Found, alone
from kvfx.reuse.segment import EXACT_PREFIX, REPAIRED, Segment

LENGTHS = (13, 11, 9)
TOKENS = sum(LENGTHS)
# keys are turned in fp32
FLOOR = 2e-5


@pytest.fixture
def pieces(some):
    return [some(count, seed) for seed, count in enumerate(LENGTHS, 1)]


@pytest.fixture
def case(runner, pieces, given):
    """Live rows of a prompt whose pieces were computed alone, but for those that are missing."""
    tokens = sum(pieces, ())

    def case(*missing: int, exact: tuple[int, ...] = (0,)):
        rows, found = runner.rows(TOKENS + 1), []
        for number, piece in enumerate(pieces):
            if number not in missing:
                start = sum(LENGTHS[:number])
                segment = alone(runner, piece)
                found.append(Found(start, segment, number in exact))
                runner.write(rows, start, segment.keys, segment.values)
        given.clear()
        return rows, tokens, found

    return case


@pytest.fixture
def given(runner, monkeypatch):
    """The positions that programs are given, call by call."""
    calls = []
    for name in ("partial", "precheck"):
        program = getattr(runner, name)

        def spied(rows, tokens, positions, *rest, name=name, program=program, **knobs):
            calls.append((name, tuple(positions)))
            return program(rows, tokens, positions, *rest, **knobs)

        monkeypatch.setattr(runner, name, spied)
    return calls


def counts(done):
    return done.new, done.repaired, done.approximate, done.depth


def error(runner, rows, tokens):
    """The largest difference from the rows of the whole prompt, relative to the largest."""
    clean = runner.rows(len(tokens))
    runner.dense(clean, tokens)
    return max(
        float((x[:, :, : len(tokens)] - y).abs().max() / y.abs().max())
        for x, y in zip((*rows.keys, *rows.values), (*clean.keys, *clean.values), strict=True)
    )


def places(*pieces: int, skip: int = 0, least: int | None = None):
    """Positions of whole pieces, or of the first `least` tokens of each, from `skip` on."""
    found = []
    for number in pieces:
        start = sum(LENGTHS[:number])
        stop = start + (LENGTHS[number] if least is None else least)
        found += range(start + skip, stop)
    return tuple(found)


@pytest.mark.parametrize(
    "policy", [ExactPrefix(), NaiveReuse(), EPIC(2), CacheBlend(0.5), KVShare()], ids=repr
)
def test_without_rows_the_prompt_is_computed(policy, runner, case, given):
    rows, tokens, found = case(0, 1, 2)
    assert found == []
    done = compute(runner, policy, rows, tokens, found)
    assert counts(done) == (TOKENS, 0, 0, 0)
    assert given == [("partial", tuple(range(TOKENS)))]
    assert done.deviation is None
    assert error(runner, rows, tokens) < 1e-12


@pytest.mark.parametrize("policy", [ExactPrefix(), EPIC(2), CacheBlend(0.5), KVShare()], ids=repr)
def test_exact_rows_are_not_computed(policy, runner, case, given):
    """KS-7: nothing at all, where all are exact."""
    rows, tokens, found = case(1, 2)
    done = compute(runner, policy, rows, tokens[:13], found)
    assert counts(done) == (0, 0, 0, 0)
    assert given == []
    done = compute(runner, policy, rows, tokens, found)
    assert counts(done) == (20, 0, 0, 0)
    assert given == [("partial", places(1, 2))]
    assert error(runner, rows, tokens) < FLOOR


def test_naive_computes_what_is_missing(runner, case, given):
    rows, tokens, found = case(2)
    done = compute(runner, NaiveReuse(), rows, tokens, found)
    assert counts(done) == (9, 0, 11, 1)
    assert given == [("partial", places(2))]
    assert error(runner, rows, tokens) > 1e-2


@pytest.mark.parametrize("k", [0, 2, 10])
def test_epic_computes_the_first_rows_of_pieces(k, runner, case, given):
    rows, tokens, found = case()
    done = compute(runner, EPIC(k), rows, tokens, found)
    repaired = min(k, 11) + min(k, 9)
    assert counts(done) == (0, repaired, 20 - repaired, 1)
    expected = (*places(1, least=k), *places(2, least=min(k, 9)))
    assert given == ([("partial", expected)] if k else [])


@pytest.mark.parametrize("k", [11, 50])
def test_epic_of_whole_pieces_is_dense(k, runner, case):
    rows, tokens, found = case()
    done = compute(runner, EPIC(k), rows, tokens, found)
    assert counts(done) == (0, 20, 0, 0)
    assert error(runner, rows, tokens) < FLOOR


@pytest.mark.parametrize(
    "policy", [CacheBlend(0.25), CacheBlend(0.25, kind="keys"), KVShare(0.25)], ids=repr
)
def test_the_ratio_is_of_the_reused_rows(policy, runner, case, given):
    """KS-2: no exact row is given to a program; the last row is, beside the chosen ones."""
    rows, tokens, found = case()
    done = compute(runner, policy, rows, tokens, found)
    # a quarter of 19, rounded up, and the last
    assert counts(done) == (0, 6, 14, 1)
    assert given == [("precheck", places(1, 2))]
    rows, tokens, found = case(1)
    done = compute(runner, policy, rows, tokens, found)
    assert counts(done) == (11, 3, 6, 1)


@pytest.mark.parametrize("policy", [CacheBlend(1.0), KVShare(1.0)], ids=repr)
@pytest.mark.parametrize("missing", [(), (1,), (2,)], ids=str)
def test_all_rows_are_dense(policy, missing, runner, case):
    """KS-1."""
    rows, tokens, found = case(*missing)
    done = compute(runner, policy, rows, tokens, found)
    assert counts(done)[2:] == (0, 0)
    assert done.deviation is None
    assert error(runner, rows, tokens) < FLOOR


@pytest.mark.parametrize("policy", [CacheBlend(1.0), KVShare(1.0)], ids=repr)
def test_without_an_exact_prefix_all_rows_are_dense(policy, runner, case, given):
    rows, tokens, found = case(exact=())
    done = compute(runner, policy, rows, tokens, found)
    assert counts(done) == (0, TOKENS, 0, 0)
    assert given[0] == ("precheck", tuple(range(TOKENS)))
    assert error(runner, rows, tokens) < 1e-12


@pytest.mark.parametrize("policy", [CacheBlend, KVShare])
def test_choosing_all_that_deviate_is_dense(policy, runner, case):
    """KS-3: the first piece, which is not known to be exact, does not deviate."""

    def found_error(ratio: float) -> float:
        rows, tokens, found = case(exact=())
        compute(runner, policy(ratio), rows, tokens, found)
        return error(runner, rows, tokens)

    # 19 of 32, beside the last row
    assert found_error(19 / 32) < FLOOR
    assert found_error(18 / 32) > 1e-3


def test_no_ratio_computes_the_checked_layers_and_the_last_row(runner, case):
    rows, tokens, found = case()
    done = compute(runner, CacheBlend(0.0), rows, tokens, found)
    assert counts(done) == (0, 1, 19, 1)
    clean = runner.rows(TOKENS + 1)
    runner.dense(clean, tokens)
    for site in range(3):
        difference = (rows.values[site] - clean.values[site])[0].abs().amax((0, 2))
        assert (float(difference[13 : TOKENS - 1].max()) < 1e-4) == (site < 2)


def test_what_was_left_is_known_for_later(runner, case):
    """Its deviation, and nothing of the rows that are exact by now."""
    rows, tokens, found = case(1)
    done = compute(runner, KVShare(0.25), rows, tokens, found)
    heads = runner.sites[1].kv_heads
    assert done.deviation.shape == (heads, TOKENS + 1)
    assert done.attention.shape == (heads, TOKENS + 1)
    left = done.deviation.sum(0) > 0
    assert int(left.sum()) == done.approximate == 6
    assert set(left.nonzero().flatten().tolist()) < set(places(2))
    assert not left[TOKENS - 1 :].any()


@pytest.mark.parametrize(("depth", "expected"), [(0, 1), (1, 2), (4, 5)])
def test_rows_are_one_step_further_than_those_they_come_from(depth, expected, runner, case):
    rows, tokens, found = case()
    old = found[1].segment
    provenance = REPAIRED if depth else EXACT_PREFIX
    segment = Segment(old.tokens, old.keys, old.values, provenance, "", depth)
    found[1] = Found(found[1].start, segment, False)
    for policy in (NaiveReuse(), CacheBlend(0.2)):
        assert compute(runner, policy, rows, tokens, found).depth == expected
    assert compute(runner, CacheBlend(1.0), rows, tokens, found).depth == 0
