"""Variable tracking: chains of assignments, and which variables hold a value (RULER's vt)."""

from __future__ import annotations

from random import Random
from string import ascii_uppercase

from kvfx.eval.tasks.haystack import fill, noise
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.score import listed, parts_said

CHAINS, HOPS, LETTERS = 2, 4, 5
INTRO = (
    "Memorize and track the chains of variable assignment hidden in the following text.\n"
    "VAR X = 1 assigns a number, and VAR Y = VAR X assigns what another variable holds.\n"
)
NUMBER, COPY = "VAR {name} = {value}.", "VAR {name} = VAR {value}."
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chains of variable assignment in the text above, {count} variables "
    "are assigned the value {value}, they are:"
)


def hide(draw: Draw) -> Sample:
    """Chains in noise, each in its order; the first assignment of the one that is asked for stands
    at the depth that was asked for, the rest of it behind that.
    """
    names = _names(draw.random, CHAINS * (HOPS + 1))
    values = draw.random.sample(range(10_000, 100_000), CHAINS)
    chains = [names[n : n + HOPS + 1] for n in range(0, len(names), HOPS + 1)]
    lines = [_lines(chain, value) for chain, value in zip(chains, values, strict=True)]
    hay = fill(draw, noise(draw), " ".join((INTRO, *(line for chain in lines for line in chain))))
    starts = [draw.depth, *(draw.random.random() for _ in chains[1:])]
    placed = [
        (place, line)
        for start, chain in zip(starts, lines, strict=True)
        for place, line in zip(_places(draw.random, start), chain, strict=True)
    ]
    slots = len(hay)
    # from behind, and of equal places the last first: chains stay in their order
    placed.reverse()
    for place, line in sorted(placed, key=lambda pair: -round(pair[0] * slots)):
        hay.insert(round(place * slots), line)
    question = QUESTION.format(value=values[0], count=len(chains[0]))
    parts = tuple(chains[0])
    return Sample(INTRO + " ".join(hay), question, listed(parts), parts)


def _names(random: Random, count: int) -> list[str]:
    """Different names of five letters."""
    known: dict[str, None] = {}
    while len(known) < count:
        known["".join(random.choices(ascii_uppercase, k=LETTERS))] = None
    return list(known)


def _lines(chain: list[str], value: int) -> list[str]:
    first = NUMBER.format(name=chain[0], value=value)
    pairs = zip(chain[1:], chain[:-1], strict=True)
    return [first, *(COPY.format(name=name, value=before) for name, before in pairs)]


def _places(random: Random, start: float) -> list[float]:
    return [start, *sorted(random.uniform(start, 1.0) for _ in range(HOPS))]


VARIABLES = Task("vt", "\n".join((INTRO, NUMBER, COPY, QUESTION)), hide, parts_said)
