"""Frequent words extraction: made-up words, the n-th of which is as frequent as Zipf's law says
(RULER's fwe).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import islice

from kvfx.errors import InputError
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.score import listed, parts_said
from kvfx.eval.tasks.words import made_up

ALPHA, ASKED = 2.0, 3
# the most frequent one is no word
DOTS = "..."
INTRO = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words.\n"
)
QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '...'. What are the three "
    "most frequently appeared words in the above coded text? Answer: According to the coded text "
    "above, the three most frequently appeared words are:"
)


def make(draw: Draw) -> Sample:
    """A coded text in a drawn order; its answer stands everywhere, no depth applies."""
    room = max(1, draw.tokens - draw.count(INTRO))
    # each word is a token or more: the law reaches no further than that
    words = [DOTS, *islice(made_up(draw.random), max(ASKED + 1, math.isqrt(2 * room)))]
    sizes = [draw.count(f" {word}") for word in words]
    frequency = _largest(sizes, room)
    times = _times(frequency, len(words))
    if len(times) < ASKED + 2 or times[ASKED] == times[ASKED + 1]:
        raise InputError(
            f"{draw.tokens} tokens have no room for words that are more frequent than others: ask "
            "for more"
        )
    coded = [word for word, number in zip(words, times, strict=False) for _ in range(number)]
    draw.random.shuffle(coded)
    parts = tuple(words[1 : ASKED + 1])
    return Sample(INTRO + " ".join(coded), QUESTION, listed(parts), parts)


def _times(frequency: int, most: int) -> list[int]:
    """How often each word stands there, if the first one does `frequency` times."""
    ranks = range(1, most + 1)
    return [number for rank in ranks if (number := round(frequency / rank**ALPHA)) > 0]


def _largest(sizes: list[int], room: int) -> int:
    """The largest frequency of the first word with which the text fits."""

    def used(frequency: int) -> int:
        times = _times(frequency, len(sizes))
        return sum(size * number for size, number in zip(sizes, times, strict=False))

    return bisect_right(range(room), room, key=used) - 1


FREQUENT_WORDS = Task("fwe", "\n".join((INTRO, DOTS, QUESTION)), make, parts_said)
