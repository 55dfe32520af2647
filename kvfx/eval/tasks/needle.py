"""Needles: a magic number stands somewhere in a long text, and is asked for by its name.

The wording is that of RULER's NIAH tasks (https://arxiv.org/abs/2404.06654, Apache-2.0).
"""

from __future__ import annotations

from functools import partial
from random import Random
from uuid import UUID

from kvfx.eval.tasks.haystack import Haystack, fill, noise, prose, strew
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.words import pairs

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
DIGITS = 7
UUID_BITS = 128


def hide(draw: Draw, haystack: Haystack, keys: int) -> Sample:
    """`keys` named numbers in a haystack; the first, at the depth that was asked for, is the one
    that the question names, the others stand anywhere.
    """
    text, names, values = strewn(draw, haystack, keys)
    question = QUESTION.format(key=names[0])
    return Sample(text, question, ANSWER.format(value=values[0]))


def strewn(draw: Draw, haystack: Haystack, keys: int) -> tuple[str, list[str], list[int]]:
    """A text in which `keys` named numbers stand, the first at the depth that was asked for, the
    others anywhere; their names, and the numbers.
    """
    names = draw.random.sample(pairs(), keys)
    values = numbers(draw.random, keys)
    needles = [
        NEEDLE.format(key=key, value=value) for key, value in zip(names, values, strict=True)
    ]
    depths = [draw.depth, *(draw.random.random() for _ in needles[1:])]
    hay = fill(draw, haystack(draw), " ".join((INTRO, *needles)))
    strew(hay, depths, needles)
    return INTRO + " ".join(hay), names, values


def hide_uuid(draw: Draw) -> Sample:
    """One named UUID in prose."""
    key, value = draw.random.choice(pairs()), uuid(draw.random)
    needle = of_uuids(NEEDLE).format(key=key, value=value)
    intro = of_uuids(INTRO)
    hay = fill(draw, prose(draw), f"{intro} {needle}")
    strew(hay, [draw.depth], [needle])
    question = of_uuids(QUESTION).format(key=key)
    return Sample(intro + " ".join(hay), question, ANSWER.format(value=value))


def numbers(random: Random, count: int) -> list[int]:
    """Different numbers of seven digits."""
    return random.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)


def uuid(random: Random) -> str:
    """A random UUID."""
    return str(UUID(int=random.getrandbits(UUID_BITS), version=4))


def of_uuids(words: str) -> str:
    """The same words about UUIDs instead of numbers."""
    return words.replace("number", "uuid")


TEMPLATE = "\n".join((INTRO, NEEDLE, QUESTION, ANSWER))
PROSE = Task("needle-prose", TEMPLATE, partial(hide, haystack=prose, keys=1))
NOISE = Task("needle-noise", TEMPLATE, partial(hide, haystack=noise, keys=1))
FOUR_KEYS = Task("needle-4-keys", TEMPLATE, partial(hide, haystack=prose, keys=4))
SIXTEEN_KEYS = Task("needle-16-keys", TEMPLATE, partial(hide, haystack=prose, keys=16))
UUIDS = Task("niah-single-3", of_uuids(TEMPLATE), hide_uuid)
