"""Needles among needles: the whole text is made of them, and one is asked for by its name.

RULER's niah_multikey_2 (words and numbers) and niah_multikey_3 (UUIDs and UUIDs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from kvfx.eval.tasks.haystack import fill, strew
from kvfx.eval.tasks.needle import (
    ANSWER,
    DIGITS,
    INTRO,
    NEEDLE,
    QUESTION,
    TEMPLATE,
    of_uuids,
    uuid,
)
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.words import NOUNS, pairs

Name = Callable[[Random], str]


def hide(draw: Draw, key: Name, value: Name, wording: Callable[[str], str]) -> Sample:
    """Nothing but needles; that which is asked for stands at the depth that was asked for."""
    entries = _entries(draw.random, key, value)
    asked, answer = next(entries)
    needle = wording(NEEDLE).format(key=asked, value=answer)
    others = (wording(NEEDLE).format(key=name, value=number) for name, number in entries)
    intro = wording(INTRO)
    hay = fill(draw, others, f"{intro} {needle}")
    strew(hay, [draw.depth], [needle])
    question = wording(QUESTION).format(key=asked)
    return Sample(intro + " ".join(hay), question, ANSWER.format(value=answer))


def _entries(random: Random, key: Name, value: Name) -> Iterator[tuple[str, str]]:
    """Names and values without end, no name and no value twice."""
    known: set[str] = set()
    while True:
        entry = key(random), value(random)
        if known.isdisjoint(entry):
            known.update(entry)
            yield entry


def _words(random: Random) -> str:
    # an adjective and a noun alone run out at 15,000 tokens
    return f"{random.choice(pairs())}-{random.choice(NOUNS)}"


def _digits(random: Random) -> str:
    return str(random.randrange(10 ** (DIGITS - 1), 10**DIGITS))


EVERYWHERE = Task(
    "niah-multikey-2", TEMPLATE, partial(hide, key=_words, value=_digits, wording=str)
)
UUIDS_EVERYWHERE = Task(
    "niah-multikey-3", of_uuids(TEMPLATE), partial(hide, key=uuid, value=uuid, wording=of_uuids)
)
