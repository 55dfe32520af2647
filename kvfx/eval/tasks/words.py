"""Words that keys, lists and codes are drawn from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from random import Random

from kvfx.testing.text import passages

ADJECTIVES = [
    "ancient",
    "bitter",
    "bright",
    "clever",
    "crooked",
    "distant",
    "eager",
    "fragile",
    "gentle",
    "hollow",
    "humble",
    "idle",
    "jolly",
    "kind",
    "lively",
    "modest",
    "narrow",
    "orange",
    "patient",
    "quiet",
    "rapid",
    "silent",
    "tender",
    "upright",
    "vivid",
    "wooden",
    "young",
]
NOUNS = [
    "anchor",
    "basket",
    "candle",
    "desert",
    "engine",
    "falcon",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orchard",
    "pencil",
    "quarry",
    "ribbon",
    "saddle",
    "temple",
    "umbrella",
    "valley",
    "window",
    "yogurt",
    "zebra",
]
# of prose, not of code: no part of a name, and no capital
WORD = re.compile(r"(?<![\w.'-])[a-z]{4,9}(?![\w'-]|\.\w)")
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@cache
def pairs() -> tuple[str, ...]:
    """Every adjective with every noun."""
    return tuple(f"{a}-{n}" for a in ADJECTIVES for n in NOUNS)


@cache
def vocabulary() -> tuple[str, ...]:
    """English words of four to nine letters, in order: those of Python's manual."""
    return tuple(sorted({word for text in passages() for word in WORD.findall(text)}))


def english(random: Random) -> Iterator[str]:
    """All words in a drawn order, then pairs of them without end; none twice."""
    words = vocabulary()
    yield from random.sample(words, len(words))
    known: set[str] = set()
    while True:
        pair = "-".join(random.sample(words, 2))
        if pair not in known:
            known.add(pair)
            yield pair


def made_up(random: Random) -> Iterator[str]:
    """Words of three syllables that mean nothing, without end; none twice."""
    known: set[str] = set()
    while True:
        word = "".join(random.choice(CONSONANTS) + random.choice(VOWELS) for _ in range(3))
        if word not in known:
            known.add(word)
            yield word
