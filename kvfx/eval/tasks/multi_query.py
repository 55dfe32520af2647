"""Several magic numbers, each under its own name: all are asked for (RULER's niah_multiquery)."""

from __future__ import annotations

from kvfx.eval.tasks.haystack import fill, prose, strew
from kvfx.eval.tasks.needle import INTRO, NEEDLE, numbers
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.score import listed, parts_said
from kvfx.eval.tasks.words import pairs

KEYS = 4
QUESTION = (
    "\nWhat are all the special magic numbers for {keys} mentioned in the provided text? "
    "The special magic numbers for {keys} mentioned in the provided text are"
)


def hide(draw: Draw) -> Sample:
    """The first at the depth that was asked for, the others anywhere; asked in another order."""
    names = draw.random.sample(pairs(), KEYS)
    values = numbers(draw.random, KEYS)
    needles = [
        NEEDLE.format(key=key, value=value) for key, value in zip(names, values, strict=True)
    ]
    depths = [draw.depth, *(draw.random.random() for _ in needles[1:])]
    hay = fill(draw, prose(draw), " ".join((INTRO, *needles)))
    strew(hay, depths, needles)
    parts = tuple(map(str, values))
    question = QUESTION.format(keys=listed(names).strip())
    return Sample(INTRO + " ".join(hay), question, listed(parts), parts)


MULTI_QUERY = Task("niah-multiquery", "\n".join((INTRO, NEEDLE, QUESTION)), hide, parts_said)
