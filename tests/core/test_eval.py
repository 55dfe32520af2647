"""Evaluation: deterministic inputs, scores that agree with the model itself, and a file that
remembers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

import kvfx
from kvfx import (
    KIVI,
    ExpectedAttention,
    Full,
    KeyDiff,
    PerLayer,
    SnapKV,
    StreamingLLM,
    Uniform,
    compiler,
)
from kvfx.errors import InputError
from kvfx.eval.answers import HIDDEN, VISIBLE, Prompt, answer_prompt, make_prompts
from kvfx.eval.equal_bytes import at_equal_bytes
from kvfx.eval.fidelity import dense_log_probs, score_window
from kvfx.eval.results import Results, open_results
from kvfx.eval.run import evaluate
from kvfx.eval.shared_prefill import share_prefill
from kvfx.eval.stats import bootstrap_mean, mcnemar, wilson
from kvfx.eval.suite import FAMILIES, Suite, task_names, with_budgets
from kvfx.eval.table import headline, sections
from kvfx.eval.tasks import TASKS
from kvfx.eval.text import Corpus, corpus, prefix_ids, token_ids, windows
from kvfx.memory import memory_bytes
from kvfx.policy import Policy
from kvfx.prefill_parts import store_part
from kvfx.sizes import size_text
from kvfx.testing.tiny import VOCAB, left_padded, tiny_llama

QUARTER = StreamingLLM(budget=0.25, interval=8)
POLICIES = (
    Full(),
    KIVI(4, residual=32),
    SnapKV(budget=20, window=4) | KIVI(8, residual=32),
    QUARTER,
    KeyDiff(budget=0.5),
)


class Letters:
    """Characters as tokens of the tiny models, behind `start`."""

    def __init__(self, *start: int) -> None:
        self.start = list(start)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [3 + ord(letter) % (VOCAB - 3) for letter in text]
        return {"input_ids": self.start + ids if add_special_tokens else ids}


LETTERS: Any = Letters()
WITH_BOS: Any = Letters(1)
TEXT = Corpus(
    "numbers", " ".join(f"There are {n * n} of them, or {n} times {n}." for n in range(300))
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(head_dim=32)


@pytest.fixture(scope="module", autouse=True)
def compress():
    """`kvfx.compress` as the sweep calls it, once per model and policy: most of the time here."""
    known: dict[tuple[int, Policy], Any] = {}
    # asked for here: `kvfx` keeps what a name first leads to, and would keep the patch
    real = kvfx.compress

    def once(model, policy, **options):
        key = (id(model), policy)
        if key not in known:
            known[key] = real(model, policy, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compress", once)
        yield once


@pytest.fixture(scope="module")
def fast(model, compress):
    """The model under every policy."""
    return {each: compress(model, each, compile=False, verify=False) for each in POLICIES}


@pytest.fixture(scope="module")
def ids():
    return windows(TEXT, LETTERS, tokens=100 + 41, count=1, seed=0)[0]


def plain_nll(model, ids, scored) -> float:
    """The mean over the last tokens, from transformers' own loss."""
    labels = ids.clone()
    labels[:-scored] = -100
    return float(model(ids[None], labels=labels[None]).loss)


def suite(**changes) -> Suite:
    options: dict[str, Any] = {
        "policies": (QUARTER,),
        "tasks": ("perplexity", "needle-noise"),
        "lengths": (600,),
        "text": TEXT,
        "seed": 0,
        "windows": 2,
        "scored": 9,
        "chunk": 4,
        "samples": 2,
    }
    return Suite(**{**options, **changes})


def test_windows_are_chosen_by_seed_and_do_not_overlap():
    found = windows(TEXT, LETTERS, tokens=63, count=100, seed=1)
    assert torch.equal(found, windows(TEXT, LETTERS, tokens=63, count=100, seed=1))
    assert not torch.equal(found, windows(TEXT, LETTERS, tokens=63, count=100, seed=2))
    stream = token_ids(LETTERS, TEXT.text)
    blocks = [stream[n : n + 63] for n in range(0, len(stream) - 62, 63)]
    assert all(window in blocks for window in found.tolist())


def test_windows_start_like_every_text():
    found = windows(TEXT, WITH_BOS, tokens=63, count=3, seed=0)
    assert found.shape == (3, 63)
    assert found[:, 0].tolist() == [1] * 3
    assert prefix_ids(LETTERS) == []


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(InputError, match="5 windows of 9999 do not fit"):
        windows(TEXT, LETTERS, tokens=9999, count=5, seed=0)


def test_texts_come_with_python_or_from_a_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("One sentence that is long enough.\nAnother one that is long enough. Short.")
    assert corpus(str(file)).sentences() == [
        "One sentence that is long enough.",
        "Another one that is long enough.",
    ]
    assert len(corpus("python").sentences()) > 1000
    with pytest.raises(InputError, match="choose from python, shakespeare"):
        corpus("no such file")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8"):
        corpus(str(file))


@pytest.mark.parametrize("chunk", [1, 7, 40, 64])
def test_full_reads_what_the_model_reads(model, fast, ids, chunk):
    dense = dense_log_probs(model, ids, 40)
    score, size = score_window(fast[Full()], ids, dense, chunk=chunk)
    # an entry for each token that is read, and no more
    read = len(ids) - 1
    assert size == memory_bytes(fast[Full()].plan, 1, read, max_length=read)
    assert score.tokens == 40
    assert score.dense_nll == pytest.approx(plain_nll(model, ids, 40), rel=1e-5)
    assert score.nll == pytest.approx(score.dense_nll, rel=1e-5)
    assert abs(score.kl) < 1e-8
    assert score.flips == 0.0


@pytest.mark.parametrize("policy", POLICIES[1:], ids=repr)
def test_the_first_prediction_reads_compressed_entries(model, fast, ids, policy):
    score, _ = score_window(fast[policy], ids, dense_log_probs(model, ids, 1), chunk=32)
    assert score.kl > 1e-7


def test_divergence_is_that_of_torch(model, fast, ids):
    dense = dense_log_probs(model, ids, 5)
    found = fast[QUARTER]
    score, _ = score_window(found, ids, dense, chunk=5)
    cache = found.new_cache()
    found(ids[None, :-6], past_key_values=cache)
    log_probs = found(ids[None, -6:-1], past_key_values=cache).logits[0].log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_probs, dense, log_target=True, reduction="sum") / 5
    assert score.kl == pytest.approx(float(expected), rel=1e-4)


def test_one_dense_pass_serves_every_policy(fast, ids):
    own = {policy: each.executor for policy, each in fast.items()}
    dense = share_prefill(list(fast.values()))
    shared = {policy: each.executor for policy, each in fast.items()}
    for runs, prompt in enumerate((ids[:99], ids[1:99], ids[:98]), 1):
        for policy, each in fast.items():
            read = []
            for each.executor in (own[policy], shared[policy]):
                out = each(prompt[None])
                read.append((out.logits, *out.past_key_values.state.tensors()))
            assert all(torch.equal(*pair) for pair in zip(*read, strict=True)), policy
        assert dense.runs == runs


def test_what_policies_have_in_common_is_computed_once(model, ids):
    """Scores of a prompt, not what a budget makes of them; another prompt is scored anew."""
    asked = (
        SnapKV(budget=0.5, window=8),
        SnapKV(budget=0.25, window=8),
        ExpectedAttention(budget=0.5),
        ExpectedAttention(budget=0.25),
    )
    models = {each: kvfx.compress(model, each, compile=False, verify=False) for each in asked}
    dense = share_prefill(list(models.values()))
    scored = Counter[str]()
    for prompt in (ids[:99], ids[:99], ids[1:99]):
        for each in models.values():
            each(prompt[None])
        scored.update(str(key[0]).rsplit(".", 1)[0] for key in dense.known)
    sites, prompts = len(models[asked[0]].plan.sites), 2
    # the first prompt is counted twice: nothing was added when it came again
    assert scored["kvfx.score_window"] == (prompts + 1) * sites
    assert scored["kvfx.query_statistics"] == (prompts + 1) * sites
    assert dense.runs == prompts


def test_the_store_part_holds_nothing_of_the_model(fast):
    for policy, own in fast.items():
        graph = store_part(own.graph("prefill")).graph
        calls = [node.target.namespace for node in graph.nodes if node.op == "call_function"]
        assert set(calls) == {"kvfx"}, policy


@pytest.mark.parametrize("policy", [Full(), KeyDiff(budget=0.5)], ids=repr)
@pytest.mark.parametrize("asked", [0, 20], ids=["visible", "hidden"])
def test_an_answer_is_a_hit_if_it_is_decoded(fast, ids, policy, asked):
    found, context = fast[policy], ids[: 100 - asked]
    cache = found.new_cache()
    # the question is read apart from the prompt, then the answer is decoded
    logits = found(context[None], past_key_values=cache).logits
    if asked:
        logits = found(ids[None, 100 - asked : 100], past_key_values=cache).logits
    answer = [int(logits[0, -1].argmax())]
    for _ in range(4):
        step = found(torch.tensor([answer[-1:]]), past_key_values=cache).logits
        answer.append(int(step[0, -1].argmax()))
    prompt = Prompt(0.5, context, ids[100 - asked : 100], torch.tensor(answer))
    hit, nll, _ = answer_prompt(found, prompt)
    assert hit
    assert nll > 0.0
    wrong = torch.tensor([*answer[:-1], (answer[-1] + 1) % VOCAB])
    missed, worse, _ = answer_prompt(found, replace(prompt, answer=wrong))
    assert not missed
    assert worse > nll


def needles(task: str, **changes) -> list[Prompt]:
    options: dict[str, Any] = {
        "tokens": 1000,
        "count": 4,
        "depths": (0.0, 1.0),
        "question": HIDDEN,
        "seed": 0,
    }
    return make_prompts(TASKS[task], TEXT, WITH_BOS, **{**options, **changes})


def same(first: list[Prompt], second: list[Prompt]) -> bool:
    return all(torch.equal(a.context, b.context) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_needles_are_where_they_should_be(task):
    prompts = needles(task)
    assert same(prompts, needles(task))
    assert not same(prompts, needles(task, seed=1))
    assert not torch.equal(prompts[0].answer, prompts[2].answer)
    for prompt in prompts:
        assert prompt.context[0] == 1
        assert 900 < len(prompt.context) <= 1000
        runs = prompt.context.unfold(0, len(prompt.answer), 1)
        place = int((runs == prompt.answer).all(1).nonzero()[0]) / len(prompt.context)
        # the introduction and, with four keys, other needles may stand before it
        assert place < 0.6 if prompt.depth == 0.0 else place > 0.8


def test_a_visible_question_is_part_of_the_context():
    for hidden, visible in zip(
        needles("needle-noise"), needles("needle-noise", question=VISIBLE), strict=True
    ):
        assert torch.equal(visible.context, torch.cat((hidden.context, hidden.question)))
        assert len(visible.question) == 0


def test_a_haystack_needs_room():
    with pytest.raises(InputError, match="no room for a haystack"):
        needles("needle-prose", tokens=200)


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar([True] * 9, [True] * 9) == 1.0
    assert mcnemar([True] * 5, [False] * 5) == 2 / 2**5
    # one gained, five lost: 2 (1 + 6) / 2^6
    assert mcnemar([False] + [True] * 5, [True] + [False] * 5) == 14 / 64


def test_intervals():
    values = [float(n % 10) for n in range(100)]
    edges = bootstrap_mean(values, 0)
    assert edges == bootstrap_mean(values, 0)
    # 1.96 standard errors of the mean
    assert edges == pytest.approx((4.5 - 0.563, 4.5 + 0.563), abs=0.05)
    assert bootstrap_mean([1.0], 0) is None
    # the published example of Wilson's interval
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_budgets_replace_those_of_select_policies():
    given = (SnapKV() | KIVI(4), KIVI(2), PerLayer(default=Full()))
    assert with_budgets(given, (0.75, 64)) == (
        SnapKV(budget=0.75) | KIVI(4),
        SnapKV(budget=64) | KIVI(4),
        KIVI(2),
        PerLayer(default=Full()),
    )
    assert with_budgets(given, ()) == given


def test_equal_bytes_mean_the_largest_budget_that_fits(model):
    refused: dict[str, str] = {}
    asked = (Full(), KIVI(4, residual=0), SnapKV(window=8), Uniform() | SnapKV(window=8))
    found = at_equal_bytes(
        model, asked, (0.5, "1KiB"), tokens=300, calibration=None, refused=refused
    )
    dense = held_bytes(model, Full(), 300)
    quantized, evicted, allocated = found
    assert quantized == KIVI(4, residual=0)
    # a count stays what it is while more is read; an allocator divides a fraction
    assert evicted == SnapKV(budget=evicted.budget, window=8)
    assert isinstance(evicted.budget, int)
    assert isinstance(allocated.parts()[0].budget, float)
    assert held_bytes(model, quantized, 300) <= dense / 2
    assert 0.48 * dense < held_bytes(model, evicted, 300) <= dense / 2
    assert "needs" in refused[f"Full() in {size_text(dense // 2)}"]
    assert (
        sorted(name.split(" in ")[1] for name in refused if name.endswith("1.0 KiB"))
        == ["1.0 KiB"] * 4
    )
    with pytest.raises(InputError, match="above 0 and at most 1"):
        at_equal_bytes(model, asked, (2.0,), tokens=300, calibration=None, refused={})


def held_bytes(model, policy, length):
    fast = kvfx.compress(model, policy, compile=False, verify=False, max_length=length)
    return fast(**left_padded((length,)), logits_to_keep=1).past_key_values.nbytes()


def test_tasks_have_families_and_hints():
    assert task_names(["needle", "needle-noise", "perplexity"]) == (
        *FAMILIES["needle"],
        "perplexity",
    )
    with pytest.raises(InputError, match="did you mean needle"):
        task_names(["nedle"])


@pytest.mark.parametrize(
    "changes", [{"windows": 0}, {"question": "shown"}, {"depths": (1.5,)}, {"depths": ()}], ids=str
)
def test_a_suite_that_makes_no_sense_is_refused(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        suite(**changes)


def test_a_sweep_is_resumed(model, tmp_path):
    path = tmp_path / "results.json"
    told: list[str] = []
    first = evaluate("tiny", model, LETTERS, suite(), open_results(path), told.append)
    assert [found.label for found in first] == [
        "Full()",
        "StreamingLLM(budget=0.25, interval=8)",
    ] * 2
    assert first[0].scores.kl < 1e-8 < first[1].scores.kl
    assert first[1].scores.cache_bytes < 0.5 * first[0].scores.cache_bytes
    assert any(line.startswith("rewriting") for line in told)
    told.clear()
    again = evaluate("tiny", model, LETTERS, suite(), open_results(path), told.append)
    assert again == first
    assert not any(line.startswith("rewriting") for line in told)
    # what is new is measured, and only that
    longer = suite(policies=(QUARTER, KIVI(4, residual=32)))
    more = evaluate("tiny", model, LETTERS, longer, open_results(path), told.append)
    assert [found for found in more if found in first] == first
    assert len(json.loads(path.read_text())["measurements"]) == 6
    fresh = evaluate("tiny", model, LETTERS, suite(), Results(None), told.append)
    assert [found.scores for found in fresh] == [found.scores for found in first]


def test_a_policy_that_does_not_fit_is_named(model):
    results = Results(None)
    asked = suite(policies=(KIVI(4, group_size=64),), tasks=("perplexity",))
    found = evaluate("tiny", model, LETTERS, asked, results, [].append)
    assert [each.label for each in found] == ["Full()"]
    (reason,) = results.refused.values()
    assert "head_dim 32 is not a multiple of group_size 64" in reason


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "other.json"
    for content in ("[1, 2]", "no json", '{"format": 99, "measurements": []}'):
        path.write_text(content)
        with pytest.raises(InputError, match=r"other\.json"):
            open_results(path)


def test_tables_say_who_is_ranked(model):
    found = evaluate("tiny", model, LETTERS, suite(), Results(None), [].append)
    fidelity, needle = sections(found)
    assert fidelity.rows[0][:3] == ("Full()", fidelity.rows[0][1], "100%")
    assert fidelity.rows[0][4] == "1.0000 [1.0000, 1.0000]"
    # random weights find no needle
    assert "below ceiling" in needle.remark
    assert [row[-1] for row in needle.rows] == ["-", "-"]
    able = [
        replace(each, scores=replace(each.scores, hits=(True, each.label == "Full()")))
        for each in found[2:]
    ]
    (ranked,) = sections(able)
    assert [row[-1] for row in ranked.rows] == ["-", "1"]
    assert ranked.markdown().splitlines()[4].startswith("| `Full()` | ")
    assert "tiny in float32 on " in headline(found)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(ranked.render())
    assert "2 of 2" in capture.get()
    assert math.isfinite(found[0].to_dict()["summary"]["perplexity"])
