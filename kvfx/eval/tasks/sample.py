"""What a generated task gives, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Sample:
    """A context that holds the answer, the question behind it, and the answer behind that; `parts`
    is what an answer in other words has to say.
    """

    context: str
    question: str
    answer: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draw:
    """What one sample is made of: at most `tokens` tokens of context, counted by `count`, in which
    the answer stands at `depth` (0 start, 1 end); prose is made of `sentences`.
    """

    tokens: int
    depth: float
    random: Random
    sentences: Sequence[str]
    count: Callable[[str], int]


@dataclass(frozen=True)
class Task:
    """A generator under its name; `template` is every word of it that is not drawn.

    `score` gives the share of a sample's answer that a text says; None: the answer is right token
    by token, or it is not.
    """

    name: str
    template: str
    make: Callable[[Draw], Sample]
    score: Callable[[str, Sample], float] | None = None
