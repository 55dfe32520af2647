"""What reuse says that it did: sums, their text, which prompts are audited and what that finds."""

from __future__ import annotations

import pytest
import torch

from kvfx.errors import InputError
from kvfx.reuse.account import STEPS, Audit, Clock, Served, Totals, audit, sampled_by

CPU = torch.device("cpu")


def served(exact=0, approximate=0, repaired=0, computed=0, read=0, **seconds):
    times = {**dict.fromkeys(STEPS, 0.0), **seconds}
    tokens = exact + approximate + repaired + computed
    return Served(tokens, exact, approximate, repaired, computed, read, times)


def test_the_hit_rate_is_what_was_found():
    assert served(exact=10, approximate=5, repaired=5, computed=20).hit_rate == 0.5
    assert served(computed=7).hit_rate == 0.0
    assert served(exact=7).hit_rate == 1.0


def test_learning_is_behind_the_prompt():
    times = {"retrieve": 1.0, "assemble": 2.0, "compute": 4.0, "adopt": 8.0, "learn": 16.0}
    assert served(computed=3, **times).prefill_seconds == 15.0


def test_totals_are_sums():
    totals = Totals()
    for each in (
        served(computed=40),
        served(exact=10, approximate=20, repaired=4, computed=6, read=1000),
        served(exact=40, read=2000),
    ):
        totals.add(each)
    assert (totals.calls, totals.calls_reused, totals.tokens) == (3, 2, 120)
    assert (totals.exact, totals.approximate, totals.repaired) == (50, 20, 4)
    assert (totals.computed, totals.read) == (46, 3000)
    assert str(totals) == (
        "2 of 3 calls and 74 of 120 tokens found (50 exact, 20 approximate, 4 computed again), "
        "46 computed; 3,000 bytes read"
    )


def test_audits_are_in_the_text():
    totals = Totals()
    totals.add(served(computed=4))
    assert "audits" not in str(totals)
    totals.audits += [Audit(0.25, True), Audit(0.75, False)]
    assert str(totals).endswith("; 2 audits: mean KL 0.5 nats, 1 agree on the next token")


def test_no_prompts_are_no_tokens():
    assert str(Totals()).startswith("0 of 0 calls and 0 of 0 tokens found")


def test_a_clock_counts_its_step_alone():
    clock = Clock(CPU)
    assert clock.seconds == dict.fromkeys(STEPS, 0.0)
    with clock("compute"):
        pass
    first = clock.seconds["compute"]
    assert first > 0.0
    with clock("compute"):
        pass
    assert clock.seconds["compute"] > first
    assert sum(clock.seconds.values()) == clock.seconds["compute"]


def test_all_or_no_prompts_are_sampled(some):
    prompts = [some(9, seed) for seed in range(50)]
    for verify, expected in (
        ("off", False),
        ("always", True),
        ("sample:0", False),
        ("sample:1", True),
    ):
        assert {sampled_by(verify)(prompt) for prompt in prompts} == {expected}


def test_tokens_decide_which_prompts_are_sampled(some):
    prompts = [some(9, seed) for seed in range(1000)]
    chosen = [sampled_by("sample:0.25")(prompt) for prompt in prompts]
    # four standard deviations of a fair draw
    assert abs(sum(chosen) - 250) < 55
    assert chosen == [sampled_by("sample:0.25")(list(prompt)) for prompt in prompts]
    more = [sampled_by("sample:0.5")(prompt) for prompt in prompts]
    assert all(later for early, later in zip(chosen, more, strict=True) if early)


@pytest.mark.parametrize(
    "verify", ["", "sometimes", "sample", "sample:", "sample:x", "sample:-0.1", "sample:1.1",
               "sample:nan", "0.5", "off:0.5"],
)  # fmt: skip
def test_another_sample_is_refused(verify):
    with pytest.raises(InputError, match=r"use 'off', 'always', or 'sample:0\.05'"):
        sampled_by(verify)


def test_an_audit_of_dense_rows_finds_nothing(runner, some):
    tokens = some(23, 1)
    rows = runner.rows(23)
    runner.dense(rows, tokens[:-1])
    found = audit(runner, rows, tokens)
    assert abs(found.kl) < 1e-12
    assert found.agrees


def test_an_audit_is_the_divergence_from_the_model(model, runner, some):
    """With transformers' logits, and those that are read over the rows of other tokens."""
    tokens, others = some(23, 1), some(22, 2)
    rows = runner.rows(23)
    runner.dense(rows, others)
    ids = torch.tensor([[*others, tokens[-1]]])
    q = model(ids).logits[0, -1].log_softmax(-1)
    p = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    found = audit(runner, rows, tokens)
    assert found.kl == pytest.approx(float(expected), rel=1e-9)
    assert found.kl > 0.1
    assert found.agrees == bool(p.argmax() == q.argmax())
