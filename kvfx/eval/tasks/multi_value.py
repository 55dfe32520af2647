"""Several magic numbers under one name: all of them are asked for (RULER's niah_multivalue)."""

from __future__ import annotations

from kvfx.eval.tasks.haystack import fill, prose
from kvfx.eval.tasks.needle import INTRO, NEEDLE, numbers
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.score import listed, parts_said
from kvfx.eval.tasks.words import pairs

VALUES = 4
QUESTION = (
    "\nWhat are all the special magic numbers for {key} mentioned in the provided text? "
    "The special magic numbers for {key} mentioned in the provided text are"
)


def hide(draw: Draw) -> Sample:
    """The first value at the depth that was asked for, the others anywhere; the answer names them
    in the order of the text.
    """
    key = draw.random.choice(pairs())
    values = numbers(draw.random, VALUES)
    depths = sorted([draw.depth, *(draw.random.random() for _ in values[1:])])
    needles = [NEEDLE.format(key=key, value=value) for value in values]
    hay = fill(draw, prose(draw), " ".join((INTRO, *needles)))
    slots = len(hay)
    # from behind: those at one place stay in their order
    for depth, needle in reversed(list(zip(depths, needles, strict=True))):
        hay.insert(round(depth * slots), needle)
    parts = tuple(map(str, values))
    return Sample(INTRO + " ".join(hay), QUESTION.format(key=key), listed(parts), parts)


MULTI_VALUE = Task("niah-multivalue", "\n".join((INTRO, NEEDLE, QUESTION)), hide, parts_said)
