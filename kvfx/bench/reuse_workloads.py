"""Prompts of real text that have pieces in common: documents in any order, agents that read each
other, and a conversation whose oldest turn is dropped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from kvfx.errors import InputError
from kvfx.eval.text import Corpus, prefix_ids, token_ids
from kvfx.reuse.agents import Slot
from kvfx.reuse.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]

RAG, AGENTS, TURNS = "rag", "agents", "turns"
WORKLOADS = (RAG, AGENTS, TURNS)
# tokens of an instruction and of a question, of what stands between the texts of agents, and of
# the documents of prompts that are read before anything is measured
ASIDE, BETWEEN, WARM = 32, 12, 64
# turns of a conversation that are kept
HISTORY = 4
# KVShare looks for runs of so many tokens
LEAST = 32
QUESTION = "question"


@dataclass(frozen=True)
class Sizes:
    """How much of everything, in tokens: a prompt of documents has `chunks` of `tokens`, a turn of
    a conversation has `turn`; `prompts` of each are measured. `agents` with roles of `role` tokens
    answer `rounds` questions of `question` tokens, drawn from `questions` different ones, in
    `answer` tokens each. The first `scored` tokens of every reply are compared.

    Raises InputError for a size below 1, and for pieces too short to be found.
    """

    chunks: int
    tokens: int
    prompts: int
    turn: int
    agents: int
    role: int
    question: int
    answer: int
    rounds: int
    questions: int
    scored: int

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: use 1 or more")
        for name in ("tokens", "turn"):
            if getattr(self, name) < LEAST:
                raise InputError(
                    f"--{name} {getattr(self, name)}: KVShare finds runs of {LEAST} tokens or "
                    "more, use as many"
                )


@dataclass(frozen=True)
class Prompts:
    """`measured` prompts, read one after the other behind the prompt `stored`; `chunk` tokens are
    in a piece that comes back. The `warm` ones share nothing with them: they make programs compile.
    """

    name: str
    title: str
    chunk: int
    warm: tuple[Layout, ...]
    stored: Layout
    measured: tuple[Layout, ...]


@dataclass(frozen=True)
class Team:
    """Agents that each read the question and the answers of those before them. `fixed` has the
    role of each agent, then what stands behind each text that it reads; `asked` says which of the
    `questions` each round is about; answers have `answer` tokens.
    """

    fixed: tuple[tuple[Tokens, ...], ...]
    questions: tuple[Tokens, ...]
    asked: tuple[int, ...]
    answer: int
    name: ClassVar[str] = AGENTS

    @property
    def title(self) -> str:
        """What is measured."""
        return (
            f"{AGENTS}: {len(self.fixed)} agents, {len(self.asked)} rounds about "
            f"{len(self.questions)} questions of {len(self.questions[0])} tokens, answers of "
            f"{self.answer}"
        )

    def templates(self) -> dict[str, list[Tokens | Slot]]:
        """The prompts of the agents, with slots for what they read."""
        return {name_of(place): _template(pieces) for place, pieces in enumerate(self.fixed)}

    def layout(self, agent: int, texts: Sequence[Tokens]) -> Layout:
        """The prompt of an agent that reads `texts`: the question, then the answers."""
        first, *behind = self.fixed[agent]
        pairs = zip(texts, behind, strict=True)
        return Layout((first, *(piece for pair in pairs for piece in pair)))


def name_of(agent: int) -> str:
    """The name of an agent, by its place; also that of its answer."""
    return f"agent {agent + 1}"


def rag(text: Corpus, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, seed: int) -> Prompts:
    """An instruction, all documents in an order that no prompt had before, and a question of its
    own.

    Raises InputError for more prompts than there are orders.
    """
    count, possible = sizes.prompts + 1, math.factorial(sizes.chunks)
    if count > possible:
        raise InputError(
            f"--prompts {sizes.prompts}: {sizes.chunks} documents have {possible - 1} orders that "
            "the prompt before has not, ask for fewer prompts or more --chunks"
        )
    lengths = [ASIDE, *[ASIDE] * count, *[sizes.tokens] * sizes.chunks]
    (instruction, *pieces), warm = _cut(text, tokenizer, lengths, seed)
    instruction = (*prefix_ids(tokenizer), *instruction)
    questions, documents = pieces[:count], pieces[count:]
    orders = [tuple(range(sizes.chunks))]
    chance = random.Random(seed)
    while len(orders) < count:
        order = tuple(chance.sample(range(sizes.chunks), sizes.chunks))
        orders += [] if order in orders else [order]
    stored, *measured = (
        Layout((instruction, *(documents[place] for place in order), question))
        for order, question in zip(orders, questions, strict=True)
    )
    title = (
        f"{RAG}: {sizes.chunks} documents of {sizes.tokens} tokens in {sizes.prompts} orders, "
        f"prompts of {len(stored.tokens)} tokens"
    )
    return Prompts(RAG, title, sizes.tokens, warm, stored, tuple(measured))


def turns(text: Corpus, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, seed: int) -> Prompts:
    """An instruction, the newest turns of a conversation, and the beginning of the next one: that
    is the question.
    """
    lengths = [ASIDE, *[sizes.turn] * (sizes.prompts + 1 + HISTORY)]
    (instruction, *said), warm = _cut(text, tokenizer, lengths, seed)
    instruction = (*prefix_ids(tokenizer), *instruction)
    stored, *measured = (
        Layout((instruction, *said[first : first + HISTORY], said[first + HISTORY][:ASIDE]))
        for first in range(sizes.prompts + 1)
    )
    title = (
        f"{TURNS}: the newest {HISTORY} turns of {sizes.turn} tokens, the oldest dropped "
        f"{sizes.prompts} times, prompts of {len(stored.tokens)} tokens"
    )
    return Prompts(TURNS, title, sizes.turn, warm, stored, tuple(measured))


def team(text: Corpus, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, seed: int) -> Team:
    """Agents of real text; a question is drawn the less often the later it stands (Zipf's law)."""
    lengths = [sizes.question] * sizes.questions
    for agent in range(sizes.agents):
        lengths += [sizes.role, *[BETWEEN] * (agent + 1)]
    pieces, _ = _cut(text, tokenizer, lengths, seed)
    start = tuple(prefix_ids(tokenizer))
    questions = tuple(pieces[: sizes.questions])
    left, fixed = iter(pieces[sizes.questions :]), []
    for agent in range(sizes.agents):
        role, *behind = (next(left) for _ in range(agent + 2))
        fixed.append(((*start, *role), *behind))
    weights = [1 / (place + 1) for place in range(sizes.questions)]
    asked = random.Random(seed).choices(range(sizes.questions), weights, k=sizes.rounds)
    return Team(tuple(fixed), questions, tuple(asked), sizes.answer)


def _template(pieces: Sequence[Tokens]) -> list[Tokens | Slot]:
    first, *behind = pieces
    names = (QUESTION, *(name_of(place) for place in range(len(behind) - 1)))
    pairs = zip(names, behind, strict=True)
    return [first, *(part for name, piece in pairs for part in (Slot(name), piece))]


def _cut(
    text: Corpus, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], seed: int
) -> tuple[list[Tokens], tuple[Layout, ...]]:
    """Consecutive pieces of `text`, from a place on that `seed` chooses; and two prompts of other
    text that have two documents in common, in both orders.
    """
    ids = token_ids(tokenizer, text.text)
    every = [*lengths, *[WARM, WARM, ASIDE, ASIDE]]
    spare = len(ids) - sum(every)
    if spare < 0:
        raise InputError(
            f"text {text.name!r} has {len(ids)} tokens, {sum(every)} are needed: ask for less, or "
            "give a longer text"
        )
    place = random.Random(seed).randint(0, spare)
    pieces: list[Tokens] = []
    for length in every:
        pieces.append(tuple(ids[place : place + length]))
        place += length
    *pieces, one, other, before, last = pieces
    return pieces, (Layout((before, one, other, last)), Layout((before, other, one, last)))
