"""The crush room: the specification's numbers, the same choice made token by token, properties."""

from __future__ import annotations

import itertools
import math
import operator
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfx.kernels.crush.reference import (
    anchor_bits,
    distances,
    page_rows,
    places,
    refine,
    seen_bits,
    spread,
    token_bits,
)
from kvfx.kernels.crush.split import fixed_anchor, picked_ranks, representatives
from kvfx.kernels.select.reference import select_recent, select_top

ANCHORS = ["mean", "random", "alternating", "zeros", "ones"]
DEFAULTS = {
    "sinks": 1, "recent": 2, "share": 0.0, "ratio": 0.25, "anchor": "mean", "bits": "half",
    "pick": "linspace", "page": 1, "seed": 0,
}  # fmt: skip


def refined(
    score: Tensor, keep: Tensor, live: Tensor, position: Tensor | None = None, **changed
) -> Tensor:
    return refine(score, keep, live, position, **{**DEFAULTS, **changed})


def prompt(
    heads: int = 3, rows: int = 41, kept: float = 0.5, page: int = 1, **changed
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, H2O's choice and live rows of two prompts; the second is padded by seven rows."""
    del page
    how = {**DEFAULTS, **changed}
    score = torch.rand(2, heads, rows)
    live = torch.ones(2, heads, rows, dtype=torch.bool)
    live[1, :, :7] = False
    count = (live.sum(-1) * kept).long()
    return score, select_top(score, live, count, how["sinks"], how["recent"], how["share"]), live


# the definition once more, with sets and sorts of Python


def oracle(
    score: list, keep: list, live: list, position: list | None, anchors: dict | None = None, **how
) -> list[set[int]]:
    """What one row of the batch keeps: lists [K][T] -> a set of rows per head, for pages of 1."""
    heads, rows = len(score), len(score[0])
    pools, marked = [], []
    for h in range(heads):
        alive = [t for t in range(rows) if live[h][t]]
        newest = how["recent"] + math.floor(sum(keep[h]) * how["share"])
        pool = alive[how["sinks"] : max(len(alive) - newest, 0)]
        pools.append(pool)
        half = ranked(score[h], pool)[: len(pool) // 2]
        marked.append({t for t in alive if keep[h][t]} if how["bits"] == "keepset" else set(half))
    return [
        oracle_head(h, score[h], keep[h], live, position, pools[h], marked, anchors, how)
        for h in range(heads)
    ]


def oracle_head(h, score, keep, live, position, pool, marked, anchors, how) -> set[int]:
    kept = [t for t in ranked(score, pool) if keep[t]]
    elected = math.floor(len(kept) * Fraction(how["ratio"]).limit_denominator(1000))
    best = set(kept[: len(kept) - elected])
    candidates = [t for t in pool if t not in best]
    vectors = {t: [bit(h, o, t, live, position, marked) for o in range(len(live))] for t in pool}
    if how["anchor"] == "mean":
        votes = [sum(vectors[t][o] for t in candidates) for o in range(len(live))]
        middle = [2 * vote > len(candidates) for vote in votes]
    else:
        assert anchors is not None
        middle = anchors[how["anchor"]]
    order = sorted(candidates, key=lambda t: sum(map(operator.ne, vectors[t], middle)))
    if how["pick"] == "stride":
        chosen = {order[i * (len(order) // elected)] for i in range(elected)}
    else:
        chosen = {order[i * (len(order) - 1) // max(elected - 1, 1)] for i in range(elected)}
    return {t for t in range(len(keep)) if keep[t] and t not in pool} | best | chosen


def bit(h: int, other: int, t: int, live: list, position: list | None, marked: list) -> bool:
    if position is None:
        return t in marked[other]
    same = [u for u in range(len(live[other])) if live[other][u]]
    same = [u for u in same if position[other][u] == position[h][t]]
    return bool(same) and same[0] in marked[other]


def ranked(score: list[float], among: list[int]) -> list[int]:
    return sorted(among, key=lambda t: (-score[t] if score[t] == score[t] else math.inf, t))


def assert_chosen(found: Tensor, score, keep, live, position=None, **changed) -> None:
    """Pass when every row of the batch keeps what the oracle says."""
    how = {**DEFAULTS, **changed}
    heads = score.shape[1]
    anchors = {
        "zeros": [False] * heads,
        "ones": [True] * heads,
        "alternating": [i % 2 == 1 for i in range(heads)],
        "random": fixed_anchor("random", heads, how["seed"], torch.device("cpu")).tolist(),
    }
    for b in range(score.shape[0]):
        where = None if position is None else position[b].tolist()
        wanted = oracle(
            score[b].tolist(), keep[b].tolist(), live[b].tolist(), where, anchors, **how
        )
        assert [set(row.nonzero().flatten().tolist()) for row in found[b]] == wanted, b


@pytest.mark.parametrize("bits", ["half", "keepset"])
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_prompts(heads, anchor, bits):
    for pick, ratio, share in (("linspace", 0.25, 0.0), ("stride", 1 / 3, 0.2), ("linspace", 1, 0)):
        how = {"anchor": anchor, "bits": bits, "pick": pick, "ratio": ratio, "share": share}
        inputs = prompt(heads, **how)
        assert_chosen(refined(*inputs, **how), *inputs, **how)


@given(st.integers(0, 10_000), st.sampled_from(ANCHORS), st.booleans(), st.booleans())
def test_any_scores_and_any_base(number, anchor, keepset, holes):
    """Ties, infinities and NaN; a base that knows no scores; live rows that are no neighbours."""
    generator = torch.Generator().manual_seed(number)
    values = torch.tensor([math.nan, -math.inf, math.inf, -1.0, 0.0, -0.0, 1.0, 2.0])
    score = values[torch.randint(8, (2, 3, 23), generator=generator)]
    live = torch.rand(2, 3, 23, generator=generator) < (0.7 if holes else 2)
    keep = live & (torch.rand(2, 3, 23, generator=generator) < 0.6)
    how = {"anchor": anchor, "bits": "keepset" if keepset else "half", "ratio": 0.4, "seed": number}
    assert_chosen(refined(score, keep, live, **how), score, keep, live, **how)


def ragged(heads: int = 3, rows: int = 17) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cache whose heads hold different tokens, and different numbers of them; garbage behind."""
    position = torch.stack(
        [torch.randperm(26)[:rows].sort().values for _ in range(2 * heads)]
    ).view(2, heads, rows)
    length = torch.randint(8, rows + 1, (2, heads, 1))
    length[0, 0], length[1, 1] = 0, rows
    live = torch.arange(rows) < length
    position = position.masked_fill(~live, 2**31 - 1).int()
    score = torch.rand(2, heads, rows).masked_fill(~live, math.nan)
    return score, select_top(score, live, length[..., 0] * 2 // 3, 1, 2), live, position


@pytest.mark.parametrize("bits", ["half", "keepset"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_caches_of_different_tokens(anchor, bits):
    inputs = ragged()
    how = {"anchor": anchor, "bits": bits, "ratio": 0.4}
    assert_chosen(refined(*inputs, **how), *inputs, **how)


@pytest.mark.parametrize("bits", ["half", "keepset"])
def test_positions_of_a_prompt_change_nothing(bits):
    score, keep, live = prompt()
    position = torch.arange(41, dtype=torch.int32).expand(2, 3, -1)
    found = refined(score, keep, live, position, bits=bits)
    assert torch.equal(found, refined(score, keep, live, bits=bits))


def test_a_token_that_a_head_does_not_hold_is_0():
    live = torch.tensor([[[True, True, True, True], [False, True, True, False]]])
    # garbage where nothing is live: padding may look like the first token
    position = torch.tensor([[[0, 2, 5, 7], [0, 0, 5, 7]]], dtype=torch.int32)
    seen = seen_bits(live, live, position).int()
    assert seen[0, 0].tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]
    assert seen[0, 1, 1:3].tolist() == [[1, 1], [1, 1]]


# golden values of the specification (2.9)

BLOCKS = [
    [0.9, 0.1, 0.2, 0.8], [0.7, 0.6, 0.3, 0.1], [0.1, 0.2, 0.1, 0.3], [0.5, 0.05, 0.6, 0.2],
    [0.2, 0.15, 0.9, 0.8],
]  # fmt: skip
TOKENS = [
    [0.30, 0.02, 0.05, 0.20, 0.01, 0.15, 0.03, 0.04, 0.12, 0.08],
    [0.25, 0.20, 0.02, 0.03, 0.10, 0.01, 0.16, 0.05, 0.14, 0.04],
    [0.28, 0.06, 0.18, 0.02, 0.12, 0.09, 0.01, 0.13, 0.08, 0.03],
    [0.22, 0.15, 0.04, 0.11, 0.02, 0.19, 0.06, 0.01, 0.05, 0.15],
]


def digits(text: str) -> list[list[int]]:
    return [[int(digit) for digit in word] for word in text.split()]


def rows_of(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def blocks() -> tuple[Tensor, Tensor]:
    """Vectors [1, 1, 5, 4, 1] of the block example, and which blocks are evicted."""
    score = torch.tensor(BLOCKS).view(1, 1, 20)
    marks = token_bits(score, torch.ones(1, 1, 20, dtype=torch.bool))
    assert marks.view(5, 4).int().tolist() == digits("1001 1110 0001 1010 0011")
    return marks.view(1, 1, 5, 4, 1), torch.tensor([[[False, True, True, True, True]]])


@pytest.mark.parametrize(
    ("anchor", "bits", "distance", "order", "kept"),
    [
        ("mean", "1011", [1, 2, 2, 1, 1], [3, 4, 1, 2], [1, 3]),
        ("alternating", "0101", [2, 3, 1, 4, 2], [2, 4, 1, 3], [1, 2]),
        ("zeros", "0000", [2, 3, 1, 2, 2], [2, 3, 4, 1], [2, 4]),
        ("ones", "1111", [2, 1, 3, 2, 2], [1, 3, 4, 2], [1, 4]),
    ],
)
def test_golden_blocks(anchor, bits, distance, order, kept):
    """GenAI: an anchor over all blocks, ranks in equal steps."""
    vectors, evicted = blocks()
    everything = torch.ones_like(evicted)
    middle = anchor_bits(vectors, everything, anchor, seed=0)
    assert middle.int().flatten().tolist() == digits(bits)[0]
    found = distances(vectors, middle)
    assert found.flatten().tolist() == distance
    by_distance = found.masked_fill(~evicted, 9).argsort(dim=-1, stable=True)
    assert by_distance.flatten().tolist()[:4] == order
    assert rows_of(spread(found, evicted, torch.tensor([[2]]), "stride")) == kept


@pytest.mark.parametrize(
    ("anchor", "kept"), [("alternating", [1, 2]), ("zeros", [2, 4]), ("ones", [1, 4])]
)
def test_golden_blocks_as_pages(anchor, kept):
    """The same choice by the op: 12 of 20 rows are kept, two of three pages are elected."""
    keep = torch.zeros(5, 4, dtype=torch.bool)
    keep[[0, 1, 3]] = True
    found = refined(
        torch.tensor(BLOCKS).view(1, 1, 20), keep.view(1, 1, 20), torch.ones(1, 1, 20).bool(),
        sinks=0, recent=0, ratio=2 / 3, anchor=anchor, pick="stride", page=4,
    )  # fmt: skip
    assert rows_of(found.view(5, 4).all(-1)) == [0, *kept]
    assert found.sum() == 12


@pytest.mark.parametrize(
    ("eligible", "budget", "kept"),
    [([0, 1, 2, 3], 2, [0, 2]), ([1, 3], 2, [1, 3]), ([2, 3], 5, [2, 3])],
    ids=str,
)
def test_golden_unit_tests_of_genai(eligible, budget, kept):
    candidates = torch.tensor([[[i in eligible for i in range(4)]]])
    # a budget cannot exceed the candidates: `refine` never asks for more
    elected = torch.tensor([[min(budget, len(eligible))]])
    assert rows_of(spread(torch.tensor([[[0, 1, 2, 3]]]), candidates, elected, "stride")) == kept


def test_golden_mean_anchor_of_genai():
    vectors = torch.tensor(digits("1010 1100 1110 0010 0000")).bool().view(1, 1, 5, 4, 1)
    middle = anchor_bits(vectors, torch.ones(1, 1, 5, dtype=torch.bool), "mean", seed=0)
    assert middle.int().flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("anchor", "distance", "linspace", "stride"),
    [
        ("mean", {2: 1, 6: 1, 7: 1, 3: 2, 4: 2, 9: 2}, [2, 9], [2, 3]),
        ("zeros", {2: 1, 6: 1, 7: 1, 3: 2, 4: 2, 9: 2}, [2, 9], [2, 3]),
        ("alternating", {6: 1, 3: 2, 4: 2, 9: 2, 2: 3, 7: 3}, [6, 7], [6, 9]),
    ],
)
def test_golden_tokens(anchor, distance, linspace, stride):
    score = torch.tensor([TOKENS])
    pool = torch.ones(1, 4, 10, dtype=torch.bool)
    marks = token_bits(score, pool)
    assert marks[0].int().tolist() == digits("1001010011 1100101010 1010110100 1101010001")
    kept = places(score.mean(1), pool[:, 0])[0]
    elected = representatives(torch.tensor([[6]]), 1 / 3)
    assert elected.item() == 2
    assert rows_of(kept < 4) == [0, 1, 5, 8]

    candidates = (kept >= 4).view(1, 1, 10)
    vectors = seen_bits(marks, pool, None)[:, :1, :, None]
    found = distances(vectors, anchor_bits(vectors, candidates, anchor, seed=0))
    assert {t: found[0, 0, t].item() for t in rows_of(candidates)} == distance
    assert rows_of(spread(found, candidates, elected, "linspace")) == linspace
    assert rows_of(spread(found, candidates, elected, "stride")) == stride


# properties of the specification (2.10)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_everything_kept_is_kept(anchor, page):
    score, _, live = prompt()
    assert torch.equal(refined(score, live, live, anchor=anchor, page=page, ratio=0.5), live)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("base", ["top", "recent"])
def test_nobody_elected_is_the_base(base, page):
    score, keep, live = prompt()
    if base == "recent":
        keep = select_recent(live, keep.sum(-1), sinks=1)
    assert torch.equal(refined(score, keep, live, ratio=0.0, page=page), keep)


@pytest.mark.parametrize("pick", ["linspace", "stride"])
@pytest.mark.parametrize("page", [1, 2, 3, 5, 16, 50], ids="page {}".format)
@pytest.mark.parametrize(("heads", "kept"), [*itertools.product([1, 3], [0.05, 0.3, 0.66, 0.9])])
def test_as_many_as_before(heads, kept, page, pick):
    how = {"ratio": 0.5, "page": page, "pick": pick, "share": 0.1}
    score, keep, live = prompt(heads, 64, kept, **how)
    found = refined(score, keep, live, **how)
    assert torch.equal(found.sum(-1), keep.sum(-1))
    assert not (found & ~live).any()
    rank = live.long().cumsum(-1)
    newest = live.sum(-1) - 2 - torch.floor(keep.sum(-1) * 0.1)
    protected = (rank <= 1) | (rank > newest[..., None])
    assert torch.equal(found & protected, keep & protected)


def test_the_best_stay_and_representatives_are_others():
    score, keep, live = prompt(rows=64)
    found = refined(score, keep, live)
    for b, h in itertools.product(range(2), range(3)):
        alive = rows_of(live[b, h])
        kept = [t for t in ranked(score[b, h].tolist(), alive[1:-2]) if keep[b, h, t]]
        elected = len(kept) // 4
        best = kept[: len(kept) - elected]
        new = set(rows_of(found[b, h])) - set(best) - set(alive[:1] + alive[-2:])
        assert set(best) <= set(rows_of(found[b, h]))
        assert len(new) == elected


def test_ones_are_zeros_from_behind():
    vectors = torch.rand(2, 3, 30, 1, 7) < 0.5
    everything = torch.ones(2, 3, 30, dtype=torch.bool)
    zeros, ones = (
        distances(vectors, anchor_bits(vectors, everything, kind, 0)) for kind in ("zeros", "ones")
    )
    assert torch.equal(ones, 7 - zeros)
    # no ties: every distance once, and as many ranks apart from either end
    zeros = torch.stack([torch.randperm(31) for _ in range(6)]).view(2, 3, 31)
    everything = torch.ones(2, 3, 31, dtype=torch.bool)
    elected = torch.full((2, 3), 11)
    picked = spread(zeros, everything, elected, "linspace")
    assert torch.equal(spread(31 - zeros, everything, elected, "linspace"), picked)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("anchor", ["mean", "zeros", "ones"])
def test_the_order_of_heads_does_not_matter(anchor, page):
    score, keep, live = prompt(heads=5)
    order = torch.randperm(5)
    found = refined(score[:, order], keep[:, order], live[:, order], anchor=anchor, page=page)
    assert torch.equal(found, refined(score, keep, live, anchor=anchor, page=page)[:, order])


def test_equal_candidates_are_spread_over_their_positions():
    """Heads agree on everything: what is left has no bit set, and ranks are rows."""
    score = (torch.arange(42, 0, -1) % 42).float().expand(1, 3, -1)
    live = torch.ones(1, 3, 42, dtype=torch.bool)
    keep = select_top(score, live, torch.full((1, 3), 32), 0, 0)
    found = refined(score, keep, live, sinks=0, recent=0, anchor="zeros")
    # rows 1 ... 24 are the best; 21 bits are theirs; 18 candidates, 8 elected
    wanted = [*range(1, 25), *([0, *range(25, 42)][i * 17 // 7] for i in range(8))]
    assert rows_of(found[0, 1]) == sorted(wanted)


def test_random_bits_come_from_seed_and_index():
    device = torch.device("cpu")
    long = fixed_anchor("random", 4096, 3, device)
    assert torch.equal(fixed_anchor("random", 17, 3, device), long[:17])
    assert not torch.equal(fixed_anchor("random", 4096, 4, device), long)
    assert abs(long.double().mean().item() - 0.5) < 4 * 0.5 / 64
    # neighbours, in index and in seed, agree half of the time
    for other in (long.roll(1), fixed_anchor("random", 4096, 4, device)):
        assert abs((other == long).double().mean().item() - 0.5) < 4 * 0.5 / 64


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_rows_of_the_batch_are_alone(anchor, page):
    """A neighbour, and padding, change nothing."""
    score, keep, live = prompt()
    how = {"anchor": anchor, "page": page, "seed": 5}
    both = refined(score, keep, live, **how)
    assert torch.equal(refined(score[:1], keep[:1], live[:1], **how), both[:1])
    bare = refined(score[1:, :, 7:], keep[1:, :, 7:], live[1:, :, 7:], **how)
    assert torch.equal(bare, both[1:, :, 7:])


def test_a_page_is_as_far_as_its_tokens():
    vectors = torch.rand(2, 3, 6, 4, 3) < 0.5
    anchor = torch.tensor([True, False, True])
    pages = distances(vectors, anchor.expand(4, 3))
    tokens = distances(vectors.flatten(2, 3)[:, :, :, None], anchor[None])
    assert torch.equal(pages, tokens.unflatten(-1, (6, 4)).sum(-1))


def test_the_mean_of_all_halves_is_zero():
    """The better half is no strict majority: an anchor over the whole pool says nothing."""
    for rows in (20, 21):
        pool = torch.ones(2, 3, rows, dtype=torch.bool)
        vectors = seen_bits(token_bits(torch.rand(2, 3, rows), pool), pool, None)[:, :, :, None]
        assert not anchor_bits(vectors, pool, "mean", 0).any()
    # over candidates it does: here they are all in the better half of head 1
    score = torch.stack([torch.arange(20.0), torch.arange(20.0, 0, -1)])[None]
    pool = torch.ones(1, 2, 20, dtype=torch.bool)
    vectors = seen_bits(token_bits(score, pool), pool, None)[:, :, :, None]
    candidates = (torch.arange(20) < 10).expand(1, 2, 20)
    assert anchor_bits(vectors, candidates, "mean", 0).tolist() == [[[[False, True]]] * 2]


# pages


def test_pages_are_neighbours_in_the_pool():
    """Pages start behind the sinks, whatever padding is before them; the rest is no page."""
    pool = torch.tensor([[[False, False, True, True, True, False, True, True]]])
    assert page_rows(pool, 2).tolist() == [[[[2, 3], [4, 6], [7, 0], [1, 5]]]]


@pytest.mark.parametrize("base", ["top", "recent"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_pages_come_whole(anchor, base):
    how = {"page": 4, "ratio": 0.5, "anchor": anchor}
    score, keep, live = prompt(rows=71, **how)
    if base == "recent":
        keep = select_recent(live, keep.sum(-1), sinks=1)
    found = refined(score, keep, live, **how)
    for b, h in itertools.product(range(2), range(3)):
        pool = rows_of(live[b, h])[1:-2]
        pages = [pool[i : i + 4] for i in range(0, len(pool) - 3, 4)]
        kept = [t for t in pool if keep[b, h, t]]
        here = set(rows_of(found[b, h]))
        whole = [page for page in pages if set(page) <= here]
        assert len(whole) >= len(kept) // 4
        singles = here & set(pool) - {t for page in whole for t in page}
        # the best pages are among them, and less than a page is single rows of the base
        sums = {tuple(page): sum(score[b, h, page].tolist()) for page in pages}
        touched = [page for page in pages if keep[b, h, page].any()]
        best = sorted(touched, key=lambda page: -sums[tuple(page)])
        assert all(page in whole for page in best[: len(kept) // 4 - len(kept) // 2 // 4])
        spare = [t for t in kept if not any(t in page for page in whole)]
        assert len(singles) < 4
        assert singles == set(ranked(score[b, h].tolist(), spare)[: len(singles)])


def test_a_page_of_one_row_is_a_row():
    """The vLLM layout's anchor alternates over heads first."""
    vectors = torch.zeros(1, 3, 5, 2, 3, dtype=torch.bool)
    pool = torch.ones(1, 3, 5, dtype=torch.bool)
    assert anchor_bits(vectors, pool, "alternating", 0).int().tolist() == [[0, 1, 0], [1, 0, 1]]


# odd ends


@pytest.mark.parametrize("rows", [1, 2, 3, 4], ids="rows {}".format)
@pytest.mark.parametrize("page", [1, 4])
def test_few_rows(rows, page):
    live = torch.ones(1, 2, rows, dtype=torch.bool)
    live[0, 0] = False
    keep = select_top(torch.rand(1, 2, rows), live, torch.ones(1, 2), 0, 0)
    found = refined(torch.rand(1, 2, rows), keep, live, sinks=0, recent=0, ratio=1.0, page=page)
    assert torch.equal(found.sum(-1), keep.sum(-1))


@pytest.mark.parametrize(
    ("entries", "ratio", "elected"),
    [(6, 1 / 3, 2), (100, 0.29, 29), (100, 0.07, 7), (7, 0.25, 1), (3, 0.25, 0), (5, 1.0, 5)],
)
def test_ratios_are_what_was_written(entries, ratio, elected):
    assert representatives(torch.tensor([entries]), ratio).item() == elected


def test_linspace_never_repeats():
    for candidates in range(1, 40):
        elected = torch.arange(candidates + 1)
        for pick in ("linspace", "stride"):
            among = torch.full_like(elected, candidates)
            taken = picked_ranks(among, elected, 41, pick)
            assert torch.equal(taken.sum(-1), elected)
            assert not taken[:, candidates:].any()
            if pick == "linspace":
                assert taken[2:, candidates - 1].all()


def test_scores_beyond_the_live_rows_are_ignored():
    score, keep, live = prompt()
    for garbage in (math.nan, math.inf, -math.inf):
        for page in (1, 4):
            other = score.masked_fill(~live, garbage)
            assert torch.equal(
                refined(other, keep, live, page=page), refined(score, keep, live, page=page)
            )
