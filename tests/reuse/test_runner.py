"""The runner: its programs are the model, see nothing behind a row, refuse what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfx.errors import InputError
from kvfx.kernels.common import ruled
from kvfx.kernels.reuse import reference
from kvfx.passes.insert_reuse import Check
from kvfx.reuse.runner import Runner
from kvfx.testing.live_rows import (
    FLOOR,
    MODELS,
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


@pytest.mark.parametrize("name", MODELS)
def test_all_rows_are_the_model(name):
    model, runner = built(name)
    tokens = some_tokens(TOKENS)
    logits, _ = dense(runner, tokens)
    # transformers takes the softmax beside sinks in fp32
    within = 1e-6 if name == "sinks" else 1e-12
    assert close(logits, model(tokens[None]).logits[0, -1], within)


def test_fp32_and_bf16_models_run():
    for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = tiny("llama", {"num_hidden_layers": 1}).to(dtype)
        runner = runner_of(model)
        tokens = some_tokens(TOKENS)
        logits, rows = dense(runner, tokens)
        assert rows.keys[0].dtype == dtype
        assert close(logits.float(), model(tokens[None]).logits[0, -1].float(), within)


@pytest.mark.parametrize("name", MODELS)
def test_padding_rows_change_nothing(name):
    _, runner = built(name)
    tokens = some_tokens(TOKENS)
    rows, padded = assembled(runner, tokens, (9, 20)), assembled(runner, tokens, (9, 20))
    expected = runner.partial(rows, tokens[[9, 12, 30]], [9, 12, 30], watch=None)
    found = runner.partial(
        padded, [7, *tokens[[9, 12]].tolist(), 5, int(tokens[30]), 3], [-1, 9, 12, -1, 30, -1],
        watch=None,
    )  # fmt: skip
    assert close(found.logits, expected.logits, 1e-12)
    assert same_rows(padded, rows, 1e-12)


def leaks(runner: Runner) -> bool:
    """Whether a row notices that rows behind it change."""
    tokens = some_tokens(TOKENS)
    rows = assembled(runner, tokens, (9, 20))
    chosen = [5, 12]
    before = runner.partial(copied(rows), tokens[chosen], chosen, watch=None).logits
    for x in (*rows.keys, *rows.values):
        x[:, :, 13:] += 3.0
    after = runner.partial(rows, tokens[chosen], chosen, watch=None).logits
    return not torch.equal(before, after)


@pytest.mark.parametrize("name", MODELS)
def test_no_row_sees_what_is_behind_it(name, monkeypatch):
    _, runner = built(name)
    assert not leaks(runner)

    def bottom_right(asked: Tensor, held: Tensor, rules: object) -> Tensor:
        end = held.shape[-1] - asked.shape[2] + torch.arange(asked.shape[2])
        return (torch.arange(held.shape[-1]) <= end[:, None])[None, None]

    monkeypatch.setattr(reference, "_reached", lambda asked, count, rules: slice(0, count))
    assert not leaks(runner)
    monkeypatch.setattr(ruled, "inside", bottom_right)
    assert leaks(runner)


@pytest.mark.parametrize("name", ["half", "two tables"])
def test_watched_attention_is_that_of_the_newest_row(name):
    model, runner = built(name)
    tokens = some_tokens(TOKENS)
    model.set_attn_implementation("eager")
    attentions = model(tokens[None], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for watch in (0, 1):
        order = torch.randperm(TOKENS)
        step = runner.partial(runner.rows(TOKENS), tokens[order], order, watch=watch)
        expected = attentions[watch][0, :, -1].unflatten(0, (runner.sites[watch].kv_heads, -1))
        assert close(step.attention.double(), expected.sum(1), 1e-6)


def test_the_factor_of_yarn_is_in_the_keys_once():
    model, runner = built("yarn")
    factor = model.model.rotary_emb.attention_scaling
    assert factor > 1.01
    tokens = some_tokens(4)
    keys, _ = segment(runner, tokens)
    normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    plain = model.model.layers[0].self_attn.k_proj(normed).view(4, 2, 16).transpose(0, 1)
    assert close(keys[0], plain * factor, FLOOR)


def test_programs_are_built_once():
    runner = Runner(built("half")[1]._raised)
    rows, tokens = runner.rows(TOKENS), some_tokens(TOKENS)
    assert runner._programs == {}
    runner.dense(rows, tokens)
    program = runner._programs[None, None]
    runner.partial(rows, tokens[-1:], [TOKENS - 1], watch=None)
    assert list(runner._programs.values()) == [program]


def test_fewer_rows_than_asked_for():
    _, runner = built("half")
    tokens = some_tokens(TOKENS)
    must = [row >= 25 for row in range(TOKENS)]
    may = [row < 3 for row in range(TOKENS)]
    rows = assembled(runner, tokens, (9, 20))
    found = runner.precheck(
        rows, tokens, range(TOKENS), must, may, keep=20, check=Check(1, "values"), watch=None
    )
    assert found.positions == (0, 1, 2, 25, 26, 27, 28, 29, 30)


def test_errors_say_what_does_not_fit():
    _, runner = built("half")
    tokens, rows = some_tokens(4), runner.rows(4)
    for positions, message in (
        ([0, 1, 2], r"tokens \[4\] and positions \[3\] must be two lists of one length"),
        ([0, 1, 2, 4], "positions 0 to 4: there are 4 live rows"),
        ([0, 1, 2, -2], "positions -2 to 2: there are 4 live rows"),
        ([0, 1, 1, 2], "two rows have one position"),
        ([-1, -1, -1, -1], "with a position that is not -1"),
    ):
        with pytest.raises(InputError, match=message):
            runner.partial(rows, tokens, positions, watch=None)
    check = Check(1, "values")
    last = ([False, False, False, True], [True, True, True, False])
    for positions, must, keep, message in (
        ([0, 2, 1, 3], last, 4, "positions must ascend"),
        ([0, 1, 2, 3], ([True] * 3 + [False], [True] * 4), 4, "is in must"),
        ([0, 1, 2, 3], ([False] * 2 + [True], [True] * 3), 4, r"one bool per row \(4 of them\)"),
        ([0, 1, 2, 3], ([True] * 4, [False] * 4), 2, "keep=2 is less than the 4 in must"),
    ):
        with pytest.raises(InputError, match=message):
            runner.precheck(rows, tokens, positions, *must, keep=keep, check=check, watch=None)
    with pytest.raises(InputError, match=r"canonical\(2, 5\) of 4 live rows"):
        runner.canonical(rows, 2, 5)
    with pytest.raises(InputError, match="4 rows at position 1 of 4 live rows"):
        runner.write(rows, 1, *segment(runner, tokens))
