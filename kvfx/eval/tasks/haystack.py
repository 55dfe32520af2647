"""Haystacks: sentences around what has to be found, as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice

from kvfx.errors import InputError
from kvfx.eval.tasks.sample import Draw

Haystack = Callable[[Draw], Iterator[str]]
NOISE_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def prose(draw: Draw) -> Iterator[str]:
    """Consecutive sentences of the text, from a random place, around its end."""
    start = draw.random.randrange(len(draw.sentences))
    return islice(cycle(draw.sentences), start, None)


def noise(draw: Draw) -> Iterator[str]:
    """The same five sentences again and again."""
    del draw
    return cycle(NOISE_SENTENCES)


def fill(draw: Draw, hay: Iterable[str], around: str) -> list[str]:
    """As many sentences as fit beside `around`."""
    room, taken, used = draw.tokens - draw.count(around), [], 0
    for sentence in hay:
        # a token more than alone: joined by a space, a sentence may be cut up otherwise
        used += draw.count(f" {sentence}")
        if used > room:
            break
        taken.append(sentence)
    if not taken:
        raise InputError(f"{draw.tokens} tokens have no room for a haystack: ask for more")
    return taken


def strew(hay: list[str], depths: Sequence[float], needles: Sequence[str]) -> None:
    """Put every needle into the haystack at its depth."""
    placed = sorted(zip(depths, needles, strict=True), reverse=True)
    for depth, needle in placed:
        hay.insert(round(depth * len(hay)), needle)
