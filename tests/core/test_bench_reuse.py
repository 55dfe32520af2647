"""`kvfx bench reuse` on a tiny model: workloads, rates, divergences, tables, and refusals."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kvfx.bench.reuse import bench_reuse, in_turns, pool_policies
from kvfx.bench.reuse_contenders import dense
from kvfx.bench.reuse_replies import answered, compared, continued
from kvfx.bench.reuse_table import APART, STEPS
from kvfx.bench.reuse_workloads import ASIDE, BETWEEN, HISTORY, Sizes, rag, team, turns
from kvfx.cli import app
from kvfx.compiler import compress
from kvfx.errors import InputError
from kvfx.eval.text import Corpus
from kvfx.policies import Full
from kvfx.reuse.agents import Slot
from kvfx.reuse.layout import Layout
from kvfx.testing.tiny import VOCAB, tiny_gemma3, tiny_llama

SIZES = Sizes(
    chunks=3,
    tokens=33,
    prompts=2,
    turn=33,
    agents=2,
    role=9,
    question=7,
    answer=5,
    rounds=3,
    questions=1,
    scored=3,
)
NUMBERS = random.Random(0)
TEXT = Corpus("numbers", " ".join(str(NUMBERS.randrange(3, VOCAB)) for _ in range(900)))
EXACT = 1e-8


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer whose tokens are words, with a BOS token before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{str(index): index for index in range(1, VOCAB)}}
    words = Tokenizer(models.WordLevel({**vocabulary, "a": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="1 $A", pair="1 $A $B", special_tokens=[("1", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(TEXT.text)
    return str(path)


@pytest.fixture(scope="module")
def found(tokenizer):
    """All workloads at small sizes."""
    return bench_reuse(
        "tiny",
        tiny_llama().requires_grad_(False),
        tokenizer,
        workloads=("rag", "turns", "agents"),
        sizes=SIZES,
        text=TEXT,
        seed=0,
        compile=False,
        tell=lambda what: None,
    )


def call(*arguments: str):
    """The result of `kvfx bench reuse`; what is no KvfxError is raised here."""
    result = CliRunner().invoke(app, ["bench", "reuse", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows_of(found, workload: str, agent: str) -> dict:
    rows = (row for row in found.rows if (row.workload, row.agent) == (workload, agent))
    return {row.contender: row for row in rows}


def test_documents_come_in_orders_of_their_own(tokenizer):
    work = rag(TEXT, tokenizer, SIZES, 0)
    every = [work.stored, *work.measured]
    documents = [layout.pieces[1:-1] for layout in every]
    assert len(set(documents)) == 1 + SIZES.prompts
    assert len({frozenset(each) for each in documents}) == 1
    assert len({layout.pieces[-1] for layout in every}) == 1 + SIZES.prompts
    assert {layout.pieces[0] for layout in every} == {every[0].pieces[0]}
    # the BOS token, once
    assert [layout.tokens.count(1) for layout in every] == [1] * len(every)
    size = 1 + ASIDE + SIZES.chunks * SIZES.tokens + ASIDE
    assert {len(layout.tokens) for layout in every} == {size}
    assert rag(TEXT, tokenizer, SIZES, 0) == work != rag(TEXT, tokenizer, SIZES, 1)
    seen = set(every[0].pieces)
    assert not any(seen & set(layout.pieces) for layout in work.warm)


def test_the_oldest_turn_is_dropped(tokenizer):
    first, *later = (work := turns(TEXT, tokenizer, SIZES, 0)).measured
    before = work.stored
    for layout in (first, *later):
        assert layout.pieces[0] == before.pieces[0]
        assert layout.pieces[1:HISTORY] == before.pieces[2 : HISTORY + 1]
        # the newest turn goes on from the question of the prompt before
        assert layout.pieces[HISTORY][:ASIDE] == before.pieces[-1]
        before = layout


def test_agents_read_those_before_them(tokenizer):
    sizes = replace(SIZES, agents=3, questions=4, rounds=200)
    group = team(TEXT, tokenizer, sizes, 0)
    templates = group.templates()
    names = [
        [part.name for part in parts if isinstance(part, Slot)] for parts in templates.values()
    ]
    assert names == [
        ["question"],
        ["question", "agent 1"],
        ["question", "agent 1", "agent 2"],
    ]
    texts = [group.questions[0], (5,) * 5, (6,) * 5]
    for place, parts in enumerate(templates.values()):
        filled = iter(texts)
        pieces = tuple(next(filled) if isinstance(part, Slot) else part for part in parts)
        assert group.layout(place, texts[: place + 1]) == Layout(pieces)
        assert pieces[0][0] == 1
        assert [len(piece) for piece in pieces[::2]] == [1 + SIZES.role] + [BETWEEN] * (place + 1)
    assert all(1 not in question for question in group.questions)
    counts = [count for _, count in sorted(Counter(group.asked).items())]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[3]


def test_every_contender_is_measured(found):
    for workload, chunk in (("rag", SIZES.tokens), ("turns", SIZES.turn)):
        rows = rows_of(found, workload, "")
        assert tuple(rows) == ("dense", *pool_policies(chunk))
        assert {row.prompts for row in rows.values()} == {SIZES.prompts}
    for agent, prompts in (("all", 6), ("agent 1", 3), ("agent 2", 3)):
        rows = rows_of(found, "agents", agent)
        assert len(rows) == 4
        assert {row.prompts for row in rows.values()} == {prompts}
    for sample in found.samples:
        assert sample.tokens == sample.found + sample.computed
        assert set(sample.seconds) <= {*STEPS, *APART}
    for row in found.rows:
        spread = row.ratio
        assert 0 < spread.least <= spread.median <= spread.most
        assert row.contender != "dense" or spread.least == spread.most == 1.0


def test_first_token_is_the_sum_of_its_steps(found):
    sample = replace(found.samples[0], seconds={"compute": 2.0, "last": 0.5, "learn": 8.0})
    assert sample.first_seconds == 2.5
    twice = replace(sample, contender="other", seconds={"compute": 1.0, "publish": 8.0})
    row = rows_of(replace(found, samples=(sample, twice)), sample.workload, "")["other"]
    assert (row.first_ms.median, row.ratio.median) == (1000.0, 2.5)
    assert row.steps["publish"] == 8000.0


def test_exact_rows_do_not_diverge_and_others_do(found):
    for workload, agent in (("rag", ""), ("turns", ""), ("agents", "all")):
        rows = rows_of(found, workload, agent)
        for name in ("dense", "ExactPrefix()"):
            assert abs(rows[name].most_kl) < EXACT
            assert rows[name].agreement == 1.0
        for name in {"NaiveReuse()", "EPIC(k=2)"} & set(rows):
            assert rows[name].kl > 1e3 * EXACT


def test_rates_are_those_of_the_workload(found):
    rows = rows_of(found, "rag", "")
    body = SIZES.chunks * SIZES.tokens + 2 * ASIDE
    known = 1 + ASIDE + SIZES.chunks * SIZES.tokens
    assert rows["dense"].found == rows["dense"].calls == rows["dense"].stored == 0
    # no order begins with the documents of another: what they share is the instruction
    assert rows["ExactPrefix()"].found < 0.6 < rows["NaiveReuse()"].found == known / body
    assert rows["NaiveReuse()"].computed == ASIDE - 1
    assert rows["EPIC(k=2)"].repaired <= 2 * SIZES.chunks
    assert 0 < rows["EPIC(k=2)"].repaired < rows["EPIC(k=7)"].repaired <= 7 * SIZES.chunks
    assert rows["KVShare(ratio=0.2)"].repaired > 0
    assert rows["NaiveReuse()"].calls == 1.0
    assert rows["NaiveReuse()"].read > 0 < rows["NaiveReuse()"].stored


def test_agents_reuse_a_question_that_comes_back(found):
    rows = rows_of(found, "agents", "all")
    assert rows["KVCOMM()"].calls == pytest.approx(2 / 3)
    assert rows["KVCOMM()"].found == pytest.approx(2 / 3)
    first = [sample for sample in found.samples if sample.agent and sample.prompt == 0]
    assert {sample.found for sample in first if sample.contender == "KVCOMM()"} == {0}
    # the text that is new was computed apart; the dense model needs none
    published = {sample.contender for sample in first if sample.seconds["publish"] > 1e-3}
    assert "dense" not in published
    assert {"KVCOMM()", "KVCOMM(mode='official')"} <= published


def test_epic_has_a_row_for_each_of_kvshare():
    assert "EPIC(k=103)" in pool_policies(512)
    assert "KVShare(ratio=0.2)" in pool_policies(512)


def test_everybody_begins_once():
    names = [list(in_turns("abc", number)) for number in range(4)]  # type: ignore[arg-type]
    assert names == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_replies_are_compared_with_the_models_own(tokenizer):
    model = tiny_llama().requires_grad_(False)
    fast = compress(model, Full(), compile=False, verify=False)
    layout, other = (Layout(((1, *range(start, start + 9)),)) for start in (5, 40))
    expected = continued(fast, layout.tokens, 4)
    ids = torch.tensor([[*layout.tokens, *expected.tokens]])
    logits = model(ids).logits[0, -5:-1].double()
    assert torch.allclose(logits.log_softmax(-1), expected.log_probs, atol=1e-4)
    assert logits.argmax(-1).tolist() == list(expected.tokens)
    filled = dense(fast).fill("", layout)
    kl, agreement = compared(fast, filled, expected)
    assert (round(kl, 8), agreement) == (0.0, 1.0)
    # a cache that was scored answers as if it had not been
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    answer = model.generate(torch.tensor([layout.tokens]), **options)[0, len(layout.tokens) :]
    assert answered(fast, filled, layout, 6) == tuple(answer.tolist())
    wrong, agreement = compared(fast, dense(fast).fill("", other), expected)
    assert wrong > 0.01
    p = expected.log_probs
    rows = torch.tensor([[*other.tokens, *expected.tokens]])
    q = model(rows).logits[0, -5:-1].double().log_softmax(-1)
    assert wrong == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_tables_and_json(found):
    document = json.loads(json.dumps(found.to_dict()))
    assert len(document["rows"]) == len(found.rows)
    assert len(document["samples"]) == len(found.samples)
    markdown = found.markdown()
    assert markdown.startswith("tiny in float32 on ")
    assert "**rag: 3 documents of 33 tokens in 2 orders, prompts of 164 tokens**" in markdown
    assert "| `KVCOMM(mode='official')` | agent 2 | " in markdown
    titles = [section.title.split(":")[0] for section in found.sections()]
    assert titles == ["rag", "turns", "agents"]
    for section in found.sections():
        assert all(len(row) == len(section.header) for row in section.rows)
    assert "agent" not in found.sections()[0].header
    assert "agent" in found.sections()[2].header


def test_command_line(folder, text, found, monkeypatch):
    sizes = ("--turn", "32", "--prompts", "1", "--scored", "2", "--text", text)
    options = ("--model", folder, "--workloads", "turns", *sizes, "--no-compile")
    document = json.loads(call(*options, "--json").stdout)
    assert [row["contender"] for row in document["rows"]][:2] == ["dense", "ExactPrefix()"]
    assert (document["compiled"], document["scored"], document["text"]) == (False, 2, text)
    # what is printed does not depend on what was measured
    monkeypatch.setattr("kvfx.bench.reuse.bench_reuse", lambda *names, **options: found)
    table = call(*options).stdout
    assert "turns: the newest 4 turns of 33 tokens" in table
    assert "median and range over prompts" in " ".join(table.split())
    assert call(*options, "--markdown").stdout.rstrip() == found.markdown().rstrip()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workloads", "rga"), "there is no workload 'rga': did you mean rag"),
        (("--workloads", ","), "--workloads names none"),
        (("--tokens", "31"), "KVShare finds runs of 32"),
        (("--scored", "0"), "--scored 0: use 1 or more"),
        (("--chunks", "2", "--tokens", "32"), "--prompts 4: 2 documents have 1 orders"),
        (("--turn", "900"), "has 900 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_nonsense_is_refused(folder, text, options, said):
    result = call("--model", folder, "--text", text, "--chunks", "3", *options)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


def test_agents_need_a_cache_that_forgets(tokenizer):
    with pytest.raises(InputError, match="agents answer from the cache that was scored"):
        bench_reuse(
            "gemma",
            tiny_gemma3().requires_grad_(False),
            tokenizer,
            workloads=("agents",),
            sizes=SIZES,
            text=TEXT,
            seed=0,
            compile=False,
            tell=lambda what: None,
        )
