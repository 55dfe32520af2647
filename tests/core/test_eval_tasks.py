"""Generated tasks: the same by seed, as long as asked for, answered by the text and not by the
question, and scored by what is said.
"""

from __future__ import annotations

import json
import re
import tokenize
from collections import Counter
from dataclasses import replace
from itertools import islice
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

from kvfx import StreamingLLM
from kvfx.errors import InputError
from kvfx.eval.answers import HIDDEN, VISIBLE, answer_prompt, make_prompts
from kvfx.eval.results import open_results
from kvfx.eval.run import evaluate
from kvfx.eval.suite import Suite, task_names
from kvfx.eval.table import sections
from kvfx.eval.tasks import ALL_TASKS, TASKS, multi_key, two_hops
from kvfx.eval.tasks.questions import described
from kvfx.eval.tasks.sample import Draw, Sample
from kvfx.eval.tasks.score import parts_said
from kvfx.eval.tasks.words import english, made_up
from kvfx.eval.text import Corpus
from kvfx.testing.tiny import VOCAB, tiny_llama

TEXT = Corpus(
    "numbers", " ".join(f"There are {n * n} of them, or {n} times {n}." for n in range(300))
)
SCORED = [name for name, task in ALL_TASKS.items() if task.score is not None]
DEPTHS = (0.0, 0.5, 1.0)
# ids below are special
OFFSET = 3


class Letters:
    """Characters as tokens; what tokenizers do that the tasks need, and no more."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [OFFSET + ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(chr(max(0, index - OFFSET)) for index in ids)


class Folded(Letters):
    """Characters as tokens of the tiny models."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [OFFSET + ord(letter) % (VOCAB - OFFSET) for letter in text]}


class Words(Letters):
    """Words as tokens."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [OFFSET + len(word) for word in text.split()]}


class Pieces(Letters):
    """At most four letters as tokens, which words, numbers and marks are cut into."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        pieces = re.findall(r" ?[a-zA-Z]{1,4}|\d{1,3}|[^a-zA-Z\d]", text)
        return {"input_ids": [OFFSET + len(piece) for piece in pieces]}


# a length with room for every task, and about how many letters a token has
TOKENIZERS: dict[str, tuple[Any, int, int]] = {
    "letters": (Letters(), 3000, 1),
    "words": (Words(), 500, 5),
    "pieces": (Pieces(), 1500, 2),
}
# letters of one sentence more, which does not fit; passages are longer
SENTENCE, PASSAGES = 150, {"qa": 550, "qa-2-hops": 600}


def draw(seed: int, depth: float = 0.5, tokens: int = 4000) -> Draw:
    return Draw(tokens, depth, Random(seed), TEXT.sentences(), len)


def sample(task: str, seed: int, depth: float = 0.5) -> Sample:
    return ALL_TASKS[task].make(draw(seed, depth))


def places(part: str, text: str) -> list[int]:
    """Where `part` stands in `text` as a whole word."""
    found = re.finditer(rf"(?<![\w-]){re.escape(part)}(?![\w-])", text)
    return [match.start() for match in found]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_seed_gives_a_sample(task):
    assert sample(task, 0) == sample(task, 0)
    assert len({sample(task, seed).answer for seed in range(5)}) > 1
    assert len({sample(task, seed).context for seed in range(5)}) == 5


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_context_is_as_long_as_asked_for(task, name):
    tokenizer, tokens, letters = TOKENIZERS[name]
    slack = PASSAGES.get(task, SENTENCE) // letters
    options: dict[str, Any] = {"tokens": tokens, "count": 3, "depths": DEPTHS, "seed": 0}
    hidden = make_prompts(ALL_TASKS[task], TEXT, tokenizer, question=HIDDEN, **options)
    visible = make_prompts(ALL_TASKS[task], TEXT, tokenizer, question=VISIBLE, **options)
    for first, second in zip(hidden, visible, strict=True):
        assert tokens - slack < len(first.context) <= tokens
        assert torch.equal(second.context, torch.cat((first.context, first.question)))
        assert len(second.question) == 0


@pytest.mark.parametrize("task", ALL_TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_a_question_does_not_tell_its_answer(task, seed):
    found = sample(task, seed)
    for part in found.parts or (found.answer.strip(),):
        assert part.lower() not in found.question.lower()
        # a record's field is said in other words: its value must not stand there
        values = json.loads(part).values() if task == "json" else ()
        assert not any(places(str(value), found.question) for value in values)


@pytest.mark.parametrize("task", ["niah-single-3", "needle-16-keys", "niah-multikey-2", "passkey"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_one_answer_stands_where_it_should(task, depth):
    found = sample(task, 1, depth)
    # a pass key is said twice
    first, *rest = places(found.answer.strip(), found.context)
    assert len(rest) == (task == "passkey")
    body = len(found.context)
    assert depth - 0.4 < first / body < depth + 0.4


def test_every_uuid_stands_once():
    found = sample("niah-multikey-3", 0)
    known = re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", found.context)
    assert len(set(known)) == len(known) > 20
    assert found.answer.strip() in known


def test_no_name_is_drawn_twice():
    def few(random: Random) -> str:
        return f"name-{random.randrange(100)}"

    def number(random: Random) -> str:
        return str(random.randrange(10**9, 10**10))

    found = multi_key.hide(draw(0), key=few, value=number, wording=str)
    names = re.findall(r"name-\d+", found.context)
    assert len(set(names)) == len(names) > 30
    for words in (made_up(Random(0)), english(Random(0))):
        first = list(islice(words, 5000))
        assert len(set(first)) == len(first)


@pytest.mark.parametrize("task", ["niah-multivalue", "niah-multiquery"])
def test_every_value_stands_once_under_its_name(task):
    found = sample(task, 3, 0.9)
    assert len(set(found.parts)) == 4
    for part in found.parts:
        (place,) = places(part, found.context)
        assert found.context[:place].endswith(": ")
    keys = re.findall(r"numbers for ([a-z-]+) is", found.context)
    assert len(set(keys)) == (1 if task == "niah-multivalue" else 4)
    assert all(key in found.question for key in keys)
    if task == "niah-multivalue":
        assert list(found.parts) == sorted(found.parts, key=found.context.index)


@pytest.mark.parametrize("depth", DEPTHS)
def test_chains_of_variables_hold_the_value(depth):
    found = sample("vt", 2, depth)
    lines = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", found.context)
    held: dict[str, str] = {}
    for name, value in lines:
        # a copy stands behind what it copies
        held[name] = value if value.isdigit() else held[value]
    (asked,) = set(re.findall(r"\d{5}", found.question))
    assert {name for name, value in held.items() if value == asked} == set(found.parts)
    assert len(held) == 10
    assert [name for name, _ in lines if name in found.parts] == list(found.parts)


def test_common_words_are_common():
    found = sample("cwe", 0)
    words = Counter(re.findall(r"\d+\. (\S+)", found.context))
    top = words.most_common()
    assert {word for word, _ in top[:10]} == set(found.parts)
    assert top[9][1] > 2 == top[10][1]
    # another ten words cannot be as common
    assert top[0][1] == top[9][1]


def test_frequent_words_follow_the_law():
    found = sample("fwe", 0)
    top = Counter(found.context.split("words.\n")[1].split()).most_common()
    assert [word for word, _ in top[:4]] == ["...", *found.parts]
    first = top[0][1]
    assert [number for _, number in top[:5]] == [round(first / rank**2) for rank in range(1, 6)]


@pytest.mark.parametrize("seed", range(5))
def test_one_passage_answers(seed):
    # as long as all passages and some prose
    found = ALL_TASKS["qa"].make(draw(seed, tokens=80_000))
    (name,) = found.parts
    (place,) = places(name, found.context)
    assert found.context.lower().count(name.lower()) == 1
    summary = re.search(r"description: (.*) Answer:", found.question)
    assert summary is not None
    assert found.context[place:].startswith(f"{name}: {summary[1]}")
    assert found.context.count(summary[1]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_two_passages_answer(seed):
    task = ALL_TASKS["qa-2-hops"]
    asked = task.make(draw(seed))
    summary = asked.question.split("description: ")[1].split(" Answer:")[0]
    (name,) = asked.parts
    (module,) = (module.name for said, module in two_hops.askable() if said == summary)
    # as long as all passages and all prose, which would tell
    prose = [*TEXT.sentences(), f"One imports {module} there.", f"One calls {name}() there."]
    found = task.make(replace(draw(seed, tokens=200_000), sentences=prose))
    assert found.question == asked.question
    assert all(found.context.count(sentence) > 0 for sentence in prose[:-2])
    # the first passage says which module that is, and no other one says the same
    assert f"\nModule {module}: {summary} " in found.context
    assert found.context.count(summary) == 1
    assert not places(module, found.question)
    # the second says which function is in it, and nothing else names either
    functions = re.findall(r"Function (\w+) of module (\S+):", found.context)
    assert [function for function, home in functions if home == module] == [name]
    assert found.context.lower().count(name) == 1
    (second,) = (line for line in found.context.splitlines() if f" of module {module}: " in line)
    assert len(places(module, found.context)) == 1 + len(places(module, second))
    assert len(functions) > 200


def test_modules_say_what_is_public():
    known = {module.name: module for module in two_hops.modules()}
    # defined elsewhere and listed; imported and not listed
    assert "heappop" in {each.name for each in known["heapq"].functions}
    assert described(tokenize, "lookup") is not None
    assert "lookup" not in {each.name for each in known["tokenize"].functions}
    # the summary names the module
    assert known["calendar"].summary is None
    summaries = [summary for summary, _ in two_hops.askable()]
    assert known["heapq"].summary in summaries
    assert len(set(summaries)) == len(summaries) > 20


def test_a_summary_names_no_function():
    made = ModuleType("made", "Here first_of takes what last_of leaves.")
    for name in ("first_of", "second"):

        def function():
            """Give whatever comes next, or nothing."""

        function.__module__ = "made"
        setattr(made, name, function)
    found = two_hops.read_module(made)
    assert found.summary == "Here first_of takes what last_of leaves."
    assert [each.name for each in found.functions] == ["second"]


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_second_passage_stands_where_it_should(depth):
    firsts = set()
    for seed in range(4):
        found = sample("qa-2-hops", seed, depth)
        (place,) = places(found.answer.strip(), found.context)
        assert depth - 0.4 < place / len(found.context) < depth + 0.4
        summary = found.question.split("description: ")[1].split(" Answer:")[0]
        firsts.add(found.context.index(summary) < place)
    # the first one stands anywhere
    assert depth in (0.0, 1.0) or firsts == {True, False}


def test_a_record_is_given_early():
    found = sample("json", 0, 1.0)
    record = json.loads(found.answer)
    (place,) = places(str(record["order"]), found.context)
    assert place / len(found.context) < 0.25
    line = found.context[place:].split(". ")[0]
    assert all(str(value) in line for value in record.values())


@pytest.mark.parametrize("task", SCORED)
def test_what_is_said_is_scored(task):
    score, found = ALL_TASKS[task].score, sample(task, 0)
    assert score is not None
    assert score(found.answer, found) == 1.0
    assert score(sample(task, 7).answer, found) < 0.3
    assert score("", found) == 0.0


def test_parts_are_whole_words_in_any_order():
    found = Sample("", "", "", ("port", "light", "1234", "Sea"))
    assert parts_said("the sea, 1234; LIGHT and port", found) == 1.0
    assert parts_said("light. 1234.", found) == 0.5
    assert parts_said("report, port-light, 12345, seas", found) == 0.0


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ('Here: {"b": "x", "a": 1} and more', 1.0),
        ('{"a": 1}', 0.5),
        ('{"a": "1", "b": "x"}', 1 / 3),
        ('{"a": true, "b": "x"}', 1 / 3),
        ('{"a": 1, "b": "x", "c": 2}', 2 / 3),
        ('{"a": 1, "b": "x"', 0.0),
        ("a is 1 and b is x", 0.0),
    ],
)
def test_json_is_parsed(said, share):
    score = ALL_TASKS["json"].score
    assert score is not None
    expected = Sample("", "", "", ('{"a": 1}', '{"b": "x"}'))
    assert score(said, expected) == pytest.approx(share)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_task_needs_room(task):
    with pytest.raises(InputError, match="tokens have no room for"):
        ALL_TASKS[task].make(draw(0, tokens=150))


def test_names_stand_for_tasks():
    assert task_names(["ruler"]) == tuple(ALL_TASKS)
    assert set(task_names(["needle", "needle-4-keys"])) == set(TASKS)
    named = ("niah-multikey-3", "niah-multivalue", "niah-multiquery", "vt", "cwe", "fwe")
    qa = ("qa", "qa-2-hops")
    assert task_names([*named, *qa, "passkey", "json"]) == (*named, *qa, "passkey", "json")
    assert set(task_names(["niah-single", "niah-multikey"])) < set(ALL_TASKS)


class Said:
    """A model that says `text` after every prompt, one token after another."""

    device = torch.device("cpu")

    def __init__(self, text: str, prompt: Any) -> None:
        self.said = Letters()(text)["input_ids"]
        self.before = len(prompt.context) + len(prompt.question)

    def new_cache(self, max_length):
        return Seen(max_length)

    def __call__(self, ids, past_key_values, logits_to_keep=0):
        logits = torch.zeros(1, ids.shape[1], 300)
        for row in range(ids.shape[1]):
            past_key_values.tokens += 1
            assert past_key_values.tokens <= past_key_values.most
            place = past_key_values.tokens - self.before
            if place >= 0:
                token = self.said[place] if place < len(self.said) else Letters.eos_token_id
                logits[0, row, token] = 9.0
        return Out(logits[:, -logits_to_keep:])


class Seen:
    def __init__(self, most):
        self.tokens, self.most = 0, most

    def nbytes(self):
        return self.tokens


class Out:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("question", [HIDDEN, VISIBLE])
def test_an_answer_in_other_words_is_decoded(question):
    task, tokenizer = ALL_TASKS["niah-multivalue"], Letters()
    (prompt,) = make_prompts(
        task,
        TEXT,
        tokenizer,  # pyright: ignore[reportArgumentType]
        tokens=2000,
        count=1,
        depths=(0.5,),
        question=question,
        seed=0,
    )
    answer = tokenizer.decode(prompt.answer.tolist())
    first, second, *_ = re.findall(r"\d+", answer)
    said = {answer: 1.0, f" {second}": 0.25, f" {second} and {first}.": 0.5, " none": 0.0}
    for text, share in said.items():
        model: Any = Said(text, prompt)
        found, _, most = answer_prompt(model, prompt)
        assert found == share
        assert most == len(prompt.context) + len(prompt.question) + len(prompt.answer) - 1
    # what comes behind the end does not count
    ended: Any = Said(f" {first}", prompt)
    ended.said += [Letters.eos_token_id, *Letters()(f" {second}")["input_ids"]]
    assert answer_prompt(ended, prompt)[0] == 0.25


def test_shares_are_measured_once_and_shown(tmp_path):
    path = tmp_path / "results.json"
    model = tiny_llama(layers=1)
    asked = Suite((StreamingLLM(budget=0.5),), ("vt",), (1200,), TEXT, 0, samples=2)
    tokenizer: Any = Folded()
    first = evaluate("tiny", model, tokenizer, asked, open_results(path), [].append)
    assert first[0].setting.options["score"] == "parts_said"
    again = evaluate("tiny", model, tokenizer, asked, open_results(path), [].append)
    assert again == first
    (section,) = sections(first)
    assert "below ceiling" in section.remark
    able = [_with_hits(each, (1.0, 1.0 if each.label == "Full()" else 0.75)) for each in first]
    (section,) = sections(able)
    assert "mean share of the parts" in section.remark
    assert [row[3] for row in section.rows] == ["2 of 2", "1 of 2"]
    assert section.rows[1][4].startswith("88% [75%, 100%]")
    assert able[1].to_dict()["summary"] == {"rate": 0.875}


def _with_hits(measurement, hits):
    return replace(measurement, scores=replace(measurement.scores, hits=hits))
