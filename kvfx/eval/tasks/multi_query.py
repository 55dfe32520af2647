"""Several magic numbers, each under its own name: all are asked for (RULER's niah_multiquery)."""

from __future__ import annotations

from kvfx.eval.tasks.haystack import prose
from kvfx.eval.tasks.needle import INTRO, NEEDLE, strewn
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.score import listed, parts_said

KEYS = 4
QUESTION = (
    "\nWhat are all the special magic numbers for {keys} mentioned in the provided text? "
    "The special magic numbers for {keys} mentioned in the provided text are"
)


def hide(draw: Draw) -> Sample:
    """The first at the depth that was asked for, the others anywhere; asked in another order."""
    text, names, values = strewn(draw, prose, KEYS)
    parts = tuple(map(str, values))
    question = QUESTION.format(keys=listed(names).strip())
    return Sample(text, question, listed(parts), parts)


MULTI_QUERY = Task("niah-multiquery", "\n".join((INTRO, NEEDLE, QUESTION)), hide, parts_said)
