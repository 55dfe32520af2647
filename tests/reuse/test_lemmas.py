"""Lemmas E1 to E7 and the properties KS-1 to KS-5, KC-1, KC-2, KC-11 of specs/reuse.md, on the
runner, with transformers' own forward pass and its own cache as oracles.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kvfx.passes.insert_reuse import KINDS, Check
from kvfx.reuse.runner import LiveRows
from kvfx.testing.live_rows import (
    FLOOR,
    MODELS,
    ROTATED,
    assembled,
    built,
    close,
    copied,
    dense,
    runner_of,
    same_rows,
    segment,
    some_tokens,
)
from kvfx.testing.tiny import tiny

TOKENS = 31
# models whose graphs differ where rows are dropped: building the program takes most of the time
CHECKED = ["half", "partial", "two tables", "nope", "window"]
CHECKS = [
    *((name, Check(0, "attention")) for name in CHECKED),
    *(("half", Check(1, kind)) for kind in KINDS),
]


def masks(must: Sequence[int], count: int = TOKENS) -> tuple[list[bool], list[bool]]:
    """`must` for these rows and the last one, `may` for the others."""
    forced = [row in must or row == count - 1 for row in range(count)]
    return forced, [not wanted for wanted in forced]


@pytest.mark.parametrize("name", MODELS)
def test_stale_rows_are_overwritten_before_they_are_seen(name):
    """E7, with rows in any order."""
    _, runner = built(name)
    tokens = some_tokens(TOKENS)
    expected, clean = dense(runner, tokens)
    rows = runner.rows(TOKENS)
    for x in (*rows.keys, *rows.values):
        x.normal_()
    order = torch.randperm(TOKENS)
    found = runner.partial(rows, tokens[order], order, watch=None)
    assert close(found.logits, expected, 1e-12)
    assert same_rows(rows, clean, 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_dense(name):
    """E5."""
    _, runner = built(name)
    tokens = some_tokens(TOKENS)
    expected, clean = dense(runner, tokens)
    rows = runner.rows(TOKENS + 9)
    for start, stop in ((0, 1), (1, 17), (17, 30)):
        runner.partial(rows, tokens[start:stop], range(start, stop), watch=None)
    found = runner.partial(rows, tokens[30:], [30], watch=None)
    assert close(found.logits, expected, 1e-12)
    for x, y in zip(rows.values, clean.values, strict=True):
        assert close(x[:, :, :TOKENS], y, 1e-12)


@pytest.mark.parametrize(("name", "check"), CHECKS, ids=str)
def test_keeping_all_rows_is_dense(name, check):
    """KS-1."""
    _, runner = built(name)
    tokens = some_tokens(TOKENS)
    expected, clean = dense(runner, tokens)
    rows = assembled(runner, tokens, (9, 20))
    found = runner.precheck(
        rows, tokens, range(TOKENS), *masks(()), keep=TOKENS, check=check, watch=None
    )
    assert torch.equal(found.logits, expected)
    assert found.positions == tuple(range(TOKENS))
    assert same_rows(rows, clean, 1e-12)


@pytest.mark.parametrize(("name", "check"), CHECKS, ids=str)
def test_precheck_is_partial_of_the_chosen_rows(name, check):
    """Rows up to the checked site are fresh; behind it the chosen ones alone are."""
    _, runner = built(name)
    tokens, site = some_tokens(TOKENS), check.site
    clean = dense(runner, tokens)[1]
    old = assembled(runner, tokens, (9, 20))
    for values in old.values:
        values += 0.1 * torch.randn_like(values)
    rows = copied(old)
    watch = 1 if name == "half" else None
    found = runner.precheck(
        rows, tokens, range(TOKENS), *masks((3, 4)), keep=11, check=check, watch=watch
    )
    assert len(found.positions) == 11
    assert {3, 4, TOKENS - 1} < set(found.positions)
    chosen = list(found.positions)
    fresh = [*clean.keys[: site + 1], *old.keys[site + 1 :]]
    values = [*clean.values[: site + 1], *old.values[site + 1 :]]
    again = copied(LiveRows(tuple(fresh), tuple(values)))
    step = runner.partial(again, tokens[chosen], chosen, watch=watch)
    assert close(found.logits, step.logits, 1e-12)
    assert same_rows(rows, again, 1e-12)
    assert (found.attention is None) == (watch is None)
    if watch is not None:
        assert close(found.attention, step.attention, 1e-6)
    difference = (clean.values[site] - old.values[site])[0].abs().sum(-1)
    assert close(found.deviation.double(), difference, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_rows_are_chosen(kind):
    """KS-4: by the definition of each score, in fp64."""
    model, runner = built("half")
    tokens, site = some_tokens(TOKENS), 1
    clean, old = dense(runner, tokens)[1], assembled(runner, tokens, (9, 20))
    v, k = ((x[site] - y[site])[0] for x, y in ((clean.values, old.values), (clean.keys, old.keys)))
    model.set_attn_implementation("eager")
    received = model(tokens[None], output_attentions=True).attentions[site][0].sum(1)
    model.set_attn_implementation("sdpa")
    alpha = received.unflatten(0, (v.shape[0], -1)).sum(1)
    scores = {
        "values": v.square().sum((0, 2)),
        "keys": k.square().sum((0, 2)),
        "attention": (alpha * v.abs().sum(-1)).sum(0),
    }
    score = scores[kind]
    best = score[:-1].argsort(descending=True)[:7].tolist()
    found = runner.precheck(
        old, tokens, range(TOKENS), *masks(()), keep=8, check=Check(site, kind), watch=None
    )
    assert found.positions == (*sorted(best), TOKENS - 1)


@pytest.mark.parametrize("name", CHECKED)
def test_a_true_prefix_does_not_deviate(name):
    """E1 and KS-2: at no site, and it is chosen last."""
    _, runner = built(name)
    tokens = some_tokens(TOKENS)
    for site in range(1, len(runner.sites)):
        clean, old = dense(runner, tokens)[1], assembled(runner, tokens, (17,))
        assert close(old.values[site][:, :, :17], clean.values[site][:, :, :17], 1e-12)
        assert close(old.keys[site][:, :, :17], clean.keys[site][:, :, :17], FLOOR)
    found = runner.precheck(
        old, tokens, range(TOKENS), *masks(()), keep=14, check=Check(1, "attention"), watch=None
    )
    assert bool((found.deviation[:, :17] <= 1e-10).all())
    assert bool((found.deviation[:, 17] > 1e-3).all())
    if name != "window":
        assert found.positions == tuple(range(17, TOKENS))


@pytest.mark.parametrize("name", [name for name in CHECKED if name != "window"])
def test_choosing_all_that_deviate_is_dense(name):
    """E3 and KS-3; one row less is not."""
    _, runner = built(name)
    tokens = some_tokens(TOKENS)
    expected, clean = dense(runner, tokens)

    def error(keep: int) -> Tensor:
        rows = assembled(runner, tokens, (17,))
        check = Check(1, "attention")
        found = runner.precheck(
            rows, tokens, range(TOKENS), *masks(()), keep=keep, check=check, watch=None
        )
        differences = [(x - y).abs().max() for x, y in zip(rows.values, clean.values, strict=True)]
        return torch.stack([(found.logits - expected).abs().max(), *differences]).max()

    assert error(TOKENS - 17) <= FLOOR * expected.abs().max()
    if len(runner.sites) > 2:
        assert error(TOKENS - 18) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_repairs_in_ascending_order_are_dense(name):
    """E4 and KS-5; in descending order they are not."""
    _, runner = built(name)
    tokens = some_tokens(TOKENS)
    expected, clean = dense(runner, tokens)

    def repaired(order: Sequence[int]) -> LiveRows:
        rows = runner.rows(TOKENS)
        runner.partial(rows, tokens[:17], range(17), watch=None)
        runner.write(rows, 17, *segment(runner, tokens[17:]))
        for position in order:
            runner.partial(rows, tokens[position : position + 1], [position], watch=None)
        return rows

    rows = repaired(range(17, TOKENS))
    assert same_rows(rows, clean, 1e-12)
    last = runner.partial(rows, tokens[-1:], [TOKENS - 1], watch=None)
    assert close(last.logits, expected, 1e-12)
    # the second of two sites reads rows of the first one alone, which know no context
    if len(runner.sites) > 2:
        assert not same_rows(repaired(range(TOKENS - 1, 16, -1)), clean, 1e-2)


def test_a_window_forgets_its_context():
    """E2: in a stack of windows W, what a segment computes alone is exact from index l (W - 1)."""
    _, runner = built("window")
    window = 5
    tokens = some_tokens(60)
    keys, values = runner.canonical(dense(runner, tokens)[1], 23, 60)
    alone = segment(runner, tokens[23:])
    for site in range(len(runner.sites)):
        first = site * (window - 1)
        for found, expected in ((keys[site], alone[0][site]), (values[site], alone[1][site])):
            assert close(found[:, first:], expected[:, first:], FLOOR)
            if site:
                assert not close(found[:, first - 1], expected[:, first - 1], 1e-3)


def test_sites_without_rotation_are_not_shifted():
    """E6: keys are written as they are, wherever they go."""
    _, runner = built("nope")
    tokens = some_tokens(9)
    keys, values = segment(runner, tokens)
    rows = runner.rows(40)
    runner.write(rows, 22, keys, values)
    plain = [site.rope is None for site in runner.sites]
    assert plain == [False, True]
    for index, free in enumerate(plain):
        assert torch.equal(rows.keys[index][0, :, 22:31], keys[index]) == free
        assert torch.equal(rows.values[index][0, :, 22:31], values[index])


def test_without_rotation_a_segment_does_not_know_where_it_is():
    """E6: what a model of NoPE layers alone computes for an isolated segment is position free."""
    model = tiny("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [0, 0]}).double()
    runner = runner_of(model)
    assert all(site.rope is None for site in runner.sites)
    tokens = some_tokens(9)
    keys, values = segment(runner, tokens)
    cache = model(tokens[None], position_ids=torch.arange(9)[None] + 137).past_key_values
    for index in range(2):
        assert close(cache.layers[index].keys[0], keys[index], 1e-12)
        assert close(cache.layers[index].values[0], values[index], 1e-12)


def test_rows_of_the_same_context_are_dense():
    """KC-1: what was computed behind this very prefix is not changed by going through canonical."""
    for name in ROTATED:
        _, runner = built(name)
        tokens = some_tokens(TOKENS)
        expected, clean = dense(runner, tokens)
        rows = runner.rows(TOKENS)
        runner.partial(rows, tokens[:9], range(9), watch=None)
        runner.write(rows, 9, *runner.canonical(clean, 9, TOKENS - 1))
        last = runner.partial(rows, tokens[-1:], [TOKENS - 1], watch=None)
        assert close(last.logits, expected, FLOOR)
        assert same_rows(rows, clean, FLOOR)


@pytest.mark.parametrize("name", ROTATED)
def test_the_first_site_knows_no_context(name):
    """KC-2: its canonical keys and values depend on the token alone; those behind do not."""
    _, runner = built(name)
    tokens = some_tokens(TOKENS)
    keys, values = runner.canonical(dense(runner, tokens)[1], 9, TOKENS)
    alone = segment(runner, tokens[9:])
    assert close(values[0], alone[1][0], 1e-14)
    assert close(keys[0], alone[0][0], FLOOR)
    assert not close(values[1], alone[1][1], 1e-2)


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("position", [0, 1, 137])
def test_a_shifted_segment_is_a_prefill_at_the_shifted_position(name, position):
    """The shift identity, with the cache of transformers as oracle; a segment is shorter than the
    smallest window, which would cut its cache.
    """
    model, runner = built(name)
    tokens = some_tokens(4)
    rows = runner.rows(200)
    runner.write(rows, position, *segment(runner, tokens))
    cache = model(tokens[None], position_ids=torch.arange(4)[None] + position).past_key_values
    for index, layer in enumerate(cache.layers):
        here = slice(position, position + 4)
        assert close(rows.keys[index][:, :, here], layer.keys, FLOOR)
        assert close(rows.values[index][:, :, here], layer.values, FLOOR)


@pytest.mark.parametrize("name", ROTATED)
def test_shifts_add_up_and_values_stay(name):
    """KC-11."""
    _, runner = built(name)
    once, twice = runner.rows(99), runner.rows(99)
    keys, values = segment(runner, some_tokens(7))
    runner.write(once, 60, keys, values)
    runner.write(twice, 30, keys, values)
    moved = tuple(k[0, :, 30:37].clone() for k in twice.keys)
    runner.write(twice, 30, moved, tuple(v[0, :, 30:37] for v in twice.values))
    for index, (k, v) in enumerate(zip(*runner.canonical(once, 60, 67), strict=True)):
        assert close(k, keys[index], 1e-6)
        assert torch.equal(v, values[index])
        assert torch.equal(twice.values[index][:, :, 30:37], once.values[index][:, :, 60:67])
    # there and back again: R(-p) R(p) R(p) k
    for found, expected in zip(runner.canonical(twice, 30, 37)[0], moved, strict=True):
        assert close(found, expected, 1e-6)
