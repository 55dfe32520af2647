"""Needles: a magic number stands somewhere in a long text, and is asked for by its name.

The wording is that of RULER's NIAH tasks (https://arxiv.org/abs/2404.06654, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice

from kvfx.errors import InputError
from kvfx.eval.tasks.sample import Draw, Sample, Task

INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is:"
)
ANSWER = " {value}"
NOISE_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
DIGITS = 7
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


def hide(draw: Draw, haystack: Callable[[Draw], Iterator[str]], keys: int) -> Sample:
    """`keys` named numbers in a haystack; the first, at the depth that was asked for, is the one
    that the question names, the others stand anywhere.
    """
    names = draw.random.sample([f"{a}-{n}" for a in ADJECTIVES for n in NOUNS], keys)
    values = draw.random.sample(range(10 ** (DIGITS - 1), 10**DIGITS), keys)
    needles = [
        NEEDLE.format(key=key, value=value) for key, value in zip(names, values, strict=True)
    ]
    depths = [draw.depth, *(draw.random.random() for _ in needles[1:])]
    hay = _fill(draw, haystack, " ".join((INTRO, *needles)))
    placed = sorted(zip(depths, needles, strict=True), reverse=True)
    for depth, needle in placed:
        hay.insert(round(depth * len(hay)), needle)
    question = QUESTION.format(key=names[0])
    return Sample(INTRO + " ".join(hay), question, ANSWER.format(value=values[0]))


def prose(draw: Draw) -> Iterator[str]:
    """Consecutive sentences of the text, from a random place, around its end."""
    start = draw.random.randrange(len(draw.sentences))
    return islice(cycle(draw.sentences), start, None)


def noise(draw: Draw) -> Iterator[str]:
    """The same five sentences again and again."""
    del draw
    return cycle(NOISE_SENTENCES)


def _fill(draw: Draw, haystack: Callable[[Draw], Iterator[str]], around: str) -> list[str]:
    """As many sentences as fit beside `around`."""
    room, hay, used = draw.tokens - draw.count(around), [], 0
    for sentence in haystack(draw):
        # a token more than alone: joined by a space, a sentence may be cut up otherwise
        used += draw.count(f" {sentence}")
        if used > room:
            break
        hay.append(sentence)
    if not hay:
        raise InputError(f"{draw.tokens} tokens have no room for a haystack: ask for more")
    return hay


TEMPLATE = "\n".join((INTRO, NEEDLE, QUESTION, ANSWER))
PROSE = Task("needle-prose", TEMPLATE, partial(hide, haystack=prose, keys=1))
NOISE = Task("needle-noise", TEMPLATE, partial(hide, haystack=noise, keys=1))
FOUR_KEYS = Task("needle-4-keys", TEMPLATE, partial(hide, haystack=prose, keys=4))
