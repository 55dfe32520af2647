"""A pass key in noise (the passkey task of https://arxiv.org/abs/2305.16300)."""

from __future__ import annotations

from kvfx.eval.tasks.haystack import fill, noise, strew
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.testing.text import PASS_KEY_HINT, PASS_KEY_QUESTION

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
ANSWER = " {key}"


def hide(draw: Draw) -> Sample:
    """A number of five digits, said twice at the depth that was asked for."""
    key = draw.random.randrange(10_000, 100_000)
    hint = PASS_KEY_HINT.format(key=key)
    hay = fill(draw, noise(draw), f"{INTRO} {hint}")
    strew(hay, [draw.depth], [hint])
    return Sample(INTRO + " ".join(hay), PASS_KEY_QUESTION, ANSWER.format(key=key))


PASS_KEY = Task("passkey", "\n".join((INTRO, PASS_KEY_HINT, PASS_KEY_QUESTION, ANSWER)), hide)
