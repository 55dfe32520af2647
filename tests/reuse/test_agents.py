"""Agents: prompts from texts that were computed once (KVCOMM), properties KC-3 to KC-9 of
specs/reuse.md, with the dense rows of the runner and transformers' own cache as oracles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from types import MethodType

import pytest
import torch
from transformers import DynamicCache

import kvfx
from kvfx.model import CompressedModel
from kvfx.reuse import Agents, Slot
from kvfx.reuse import ground as home
from kvfx.reuse.agents import Call
from kvfx.reuse.runner import LiveRows, Runner
from kvfx.reuse.segment import context_hash
from kvfx.testing.live_rows import FLOOR, close, copied, dense, same_rows, some_tokens
from kvfx.testing.tiny import tiny

LENGTH = 12
MADE: dict[tuple[str, int], tuple[object, object]] = {}
CHANGES: dict[str, dict[str, object]] = {
    "llama": {"num_hidden_layers": 3},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@cache
def compressed(architecture: str, dtype: torch.dtype) -> CompressedModel:
    """A tiny model with all its entries kept; shared."""
    model = tiny(architecture, CHANGES[architecture]).to(dtype)
    return kvfx.compress(model, "Full()", compile=False, verify=False)


@pytest.fixture(autouse=True)
def prepared_once(monkeypatch):
    """The graph of a model is raised, and its rows are probed, once for all agents."""
    for name in ("raised_graph", "Runner", "probe"):
        monkeypatch.setattr(home, name, partial(made, name, getattr(home, name)))


def made(name: str, make: Callable[..., object], first: object, *rest: object, **options: object):
    """What `make` gave for this very `first` argument."""
    key = name, id(first)
    if key not in MADE:
        MADE[key] = first, make(first, *rest, **options)
    return MADE[key][1]


def text(seed: int, length: int = LENGTH) -> list[int]:
    return some_tokens(length, seed).tolist()


def near(other: Sequence[int], last: int) -> list[int]:
    """The same text but for its last token."""
    return [*other[:-1], last]


TEMPLATE = [text(101, 7), Slot("q"), text(102, 5)]
TWO = [text(103, 6), Slot("q"), text(104, 4), Slot("a"), text(105, 3)]


def agents(
    templates=None, policy="KVCOMM()", *, architecture="llama", dtype=torch.float64, **options
) -> Agents:
    """Agents with one template, "one", or these."""
    fast = compressed(architecture, dtype)
    return Agents(fast, templates or {"one": TEMPLATE}, policy, **options)


def prefill(team: Agents, agent: str, **texts: Sequence[int]) -> tuple[Call, LiveRows]:
    """A call, and the live rows that became its cache."""
    seen: list[LiveRows] = []

    def store(adopter, rows: LiveRows, tokens: Sequence[int]):
        seen.append(copied(rows))
        return type(adopter).cache(adopter, rows, tokens)

    team.adopter.cache = MethodType(store, team.adopter)  # pyright: ignore[reportAttributeAccessIssue]
    return team.prefill(agent, texts), seen[0]


def error(team: Agents, call: Call, rows: LiveRows) -> float:
    """The largest difference of values from the dense ones, of all sites."""
    clean = dense(team.runner, call.input_ids[0])[1]
    return max(float((x - y).abs().max()) for x, y in zip(rows.values, clean.values, strict=True))


def next_logits(runner: Runner, rows: LiveRows, ids: torch.Tensor) -> torch.Tensor:
    return runner.partial(rows, ids[0, -1:], [ids.shape[1] - 1], watch=None).logits


def assert_dense(team: Agents, call: Call, rows: LiveRows, within: float) -> None:
    """Rows and next-token logits are those of the whole prompt; values went through no rotation."""
    logits, clean = dense(team.runner, call.input_ids[0])
    assert same_rows(rows, clean, within)
    assert error(team, call, rows) <= 1e-9
    assert close(next_logits(team.runner, rows, call.input_ids), logits, within)


def contents(team: Agents, slot: str) -> list[str]:
    return [anchor.base.content for anchor in team.pools[slot].anchors]


def naive(team: Agents, call: Call, texts: Sequence[Sequence[int]]) -> LiveRows:
    """Rows of a prompt whose pieces know nothing of those before them but among themselves."""
    rows, position = team.runner.rows(call.input_ids.shape[1]), 0
    fixed = [TEMPLATE[0], texts[0], TEMPLATE[2]]
    for piece in fixed:
        part = dense(team.runner, torch.tensor(piece))[1]
        team.runner.write(rows, position, *team.runner.canonical(part, 0, len(piece)))
        position += len(piece)
    return rows


@pytest.mark.parametrize("architecture", CHANGES)
def test_a_text_that_stood_there_before_is_dense(architecture):
    """KC-3, and KC-6: among other anchors too."""
    team = agents(architecture=architecture)
    prefill(team, "one", q=text(1))
    for others in ((), (2, 3)):
        for seed in others:
            prefill(team, "one", q=text(seed))
        call, rows = prefill(team, "one", q=text(1))
        assert call.reused
        assert call.verdicts["q"].exact
        assert call.verdicts["q"].contents == (context_hash(text(1)),)
        assert_dense(team, call, rows, FLOOR)
        # what was computed alone is something else
        assert error(team, call, naive(team, call, [text(1)])) > 1e-2
    assert len(contents(team, "q")) == 3
    assert (call.served.tokens, call.served.computed, call.served.exact) == (23, 0, 7)
    assert call.served.approximate == 16
    assert call.served.read == team.publish(text(1)).nbytes


def test_in_official_mode_other_anchors_dilute_it():
    """KC-6: the published code has no short cut."""
    team = agents(policy="KVCOMM(mode='official', gamma=1.0)")
    for seed in (1, 2, 1):
        call, rows = prefill(team, "one", q=text(seed))
    assert call.reused
    assert not call.verdicts["q"].exact
    assert error(team, call, rows) > 1e-9


@pytest.mark.parametrize("shift", [0, 41])
def test_offsets_are_those_of_the_text_wherever_it_stands(shift):
    """KC-4: everything moved by `shift`, with the cache of transformers as oracle."""
    team = agents()
    call, _ = prefill(team, "one", q=text(1))
    base, pool, template = team.publish(text(1)), team.pools["q"], team.templates["one"]
    slot, behind = pool.estimate(base, "one:0", pool.gate(base, "one:0"))
    first, last = template.pieces
    parts = [
        (first.keys, first.values),
        slot.added_to(base.keys, base.values),
        behind.added_to(last.keys, last.values),
    ]
    rows, position = team.runner.rows(shift + call.input_ids.shape[1]), shift
    for keys, values in parts:
        team.runner.write(rows, position, keys.unbind(0), values.unbind(0))
        position += keys.shape[2]
    there = torch.arange(call.input_ids.shape[1])[None] + shift
    oracle = team.fast.source(call.input_ids, position_ids=there).past_key_values
    for index, layer in enumerate(oracle.layers):
        assert close(rows.keys[index][:, :, shift:], layer.keys, FLOOR)
        assert close(rows.values[index][:, :, shift:], layer.values, FLOOR)
    # and the logits do not depend on where everything stands
    held = DynamicCache()
    for index in range(len(oracle.layers)):
        pair = (x[index][:, :, shift:-1] for x in (rows.keys, rows.values))
        held.update(*pair, index)
    last = {"input_ids": call.input_ids[:, -1:], "position_ids": there[:, -1:]}
    found = team.fast.source(**last, past_key_values=held).logits
    assert close(found, team.fast.source(call.input_ids).logits[:, -1:], FLOOR)


def test_without_two_anchors_the_prompt_is_computed():
    """KC-8: bitwise what the runner computes without reuse."""
    team = agents()
    for count in range(2):
        call, rows = prefill(team, "one", q=text(1 + count))
        assert not call.reused
        assert f"{count} of {count} anchors serve one:0 and 12 tokens" in call.verdicts["q"].reason
        clean = dense(team.runner, call.input_ids[0])[1]
        pairs = zip((*rows.keys, *rows.values), (*clean.keys, *clean.values), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
        ids = call.input_ids
        assert torch.equal(
            next_logits(team.runner, rows, ids), next_logits(team.runner, clean, ids)
        )
        served = call.served
        assert (served.computed, served.exact, served.approximate, served.read) == (23, 0, 0, 0)


def test_a_text_that_is_near_is_estimated_and_one_that_is_not_is_computed():
    team = agents(policy="KVCOMM(gamma=1.0)")
    for seed in (1, 2):
        prefill(team, "one", q=text(seed))
    call, rows = prefill(team, "one", q=near(text(1), 9))
    assert call.reused
    assert not call.verdicts["q"].exact
    assert call.verdicts["q"].nucleus == (context_hash(text(1)),)
    assert [anchor.hits for anchor in team.pools["q"].anchors] == [1, 0]
    assert 1e-6 < error(team, call, rows) < error(team, call, naive(team, call, [near(text(1), 9)]))
    far, _ = prefill(team, "one", q=text(7))
    assert not far.reused
    assert "away, more than 0.5" in far.verdicts["q"].reason
    # what was computed is an anchor now, what was estimated is not
    assert contents(team, "q") == [context_hash(text(seed)) for seed in (1, 2, 7)]


def test_only_slots_that_failed_learn():
    team = agents({"two": TWO})
    first, _ = prefill(team, "two", q=text(1), a=text(2))
    assert not any(verdict.shareable for verdict in first.verdicts.values())
    known = team.pools["q"].anchors[0]
    second, rows = prefill(team, "two", q=text(1), a=text(3))
    assert {name: verdict.shareable for name, verdict in second.verdicts.items()} == {
        "q": True,
        "a": False,
    }
    assert not second.reused
    assert_dense(team, second, rows, 1e-12)
    assert team.pools["q"].anchors == [known]
    assert contents(team, "a") == [context_hash(text(2)), context_hash(text(3))]
    third, rows = prefill(team, "two", q=text(1), a=text(3))
    assert third.reused
    assert_dense(team, third, rows, FLOOR)


def test_agents_share_the_anchors_of_a_slot_and_have_offsets_of_their_own():
    team = agents({"one": TEMPLATE, "two": TWO})
    assert set(team.pools) == {"q", "a"}
    prefill(team, "one", q=text(1))
    call, _ = prefill(team, "two", q=text(1), a=text(2))
    assert not call.verdicts["q"].shareable
    assert "0 of 1 anchors serve two:0" in call.verdicts["q"].reason
    (anchor,) = team.pools["q"].anchors
    assert set(anchor.offsets) == {"one:0", "two:0"}
    mine, other = (anchor.offsets[consumer][0].values for consumer in ("one:0", "two:0"))
    assert not close(mine, other, 1e-2)
    for agent, texts in (("one", {"q": text(1)}), ("two", {"q": text(1), "a": text(2)})):
        call, rows = prefill(team, agent, **texts)
        assert call.reused
        assert_dense(team, call, rows, FLOOR)


def test_the_anchor_that_was_used_least_goes():
    """KC-10, end to end."""
    team = agents(policy="KVCOMM(max_anchors=2, window=2)")
    for seed in (1, 2, 1, 3):
        prefill(team, "one", q=text(seed))
    assert contents(team, "q") == [context_hash(text(1)), context_hash(text(3))]
    unused = agents(policy="KVCOMM(max_anchors=2, window=2)")
    for seed in (1, 2, 3):
        prefill(unused, "one", q=text(seed))
    assert contents(unused, "q") == [context_hash(text(2)), context_hash(text(3))]


@pytest.mark.parametrize("mode", ["canonical", "official"])
def test_the_entropy_gate(mode):
    """KC-9: gamma=1 refuses nobody, gamma=0 all whose anchors are not one-hot."""
    for gamma, expected in ((1.0, True), (0.0, False)):
        policy = f"KVCOMM(mode={mode!r}, gamma={gamma}, furthest=9.0, temperature=1.0)"
        team = agents(policy=policy, verify="always")
        for seed in (1, 2, 3):
            call, _ = prefill(team, "one", q=text(seed))
        assert call.reused == expected
        assert ("too much alike" in call.verdicts["q"].reason) != expected
        assert len(team.totals.audits) == 3
        assert (team.totals.audits[-1].kl < 1e-12) != expected
    sharp = agents(policy="KVCOMM(gamma=0.0, temperature=0.0001)")
    for seed in (1, 2):
        prefill(sharp, "one", q=text(seed))
    call, _ = prefill(sharp, "one", q=near(text(1), 9))
    assert (call.reused, call.verdicts["q"].entropy) == (True, 0.0)


def test_shorter_texts_need_the_lengths_of_the_paper():
    found = {}
    for lengths in ("strict", "paper"):
        team = agents(policy=f"KVCOMM(lengths={lengths!r}, gamma=1.0, furthest=9.0)")
        for seed in (1, 2):
            prefill(team, "one", q=text(seed))
        longer, _ = prefill(team, "one", q=text(3, LENGTH + 1))
        assert not longer.reused
        call, rows = prefill(team, "one", q=text(1)[:9])
        assert rows.length == call.input_ids.shape[1] == 21
        found[lengths] = call.reused
    assert found == {"strict": False, "paper": True}


@pytest.mark.parametrize("architecture", CHANGES)
def test_bf16_models_run(architecture):
    team = agents(architecture=architecture, dtype=torch.bfloat16, verify="always")
    for seed in (1, 2, 1):
        call, rows = prefill(team, "one", q=text(seed))
    assert call.reused
    clean = dense(team.runner, call.input_ids[0])[1]
    assert same_rows(rows, clean, 5e-2)
    assert rows.keys[0].dtype == team.pools["q"].anchors[0].base.keys.dtype == torch.bfloat16
    assert team.totals.audits[-1].kl < 0.1
