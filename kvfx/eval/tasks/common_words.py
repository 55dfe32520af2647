"""Common words extraction: a list in which ten words stand more often than others (RULER's cwe)."""

from __future__ import annotations

from itertools import count

from kvfx.errors import InputError
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.score import listed, parts_said
from kvfx.eval.tasks.words import english

COMMON = 10
# how often a common word stands there, if that is at most half of the list, and any other
TIMES, RARE_TIMES = (30, 20, 10, 5), 2
INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
ITEM = "{number}. {word}"
QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)


def make(draw: Draw) -> Sample:
    """A list in a drawn order; its answer stands everywhere, no depth applies."""
    words = english(draw.random)
    common = [next(words) for _ in range(COMMON)]
    numbers, room = count(1), draw.tokens - draw.count(INTRO)
    size = sum(draw.count(f" {word}") for word in common) + COMMON * draw.count(" 100.")
    times = next((times for times in TIMES if 2 * times * size <= room), None)
    if times is None:
        raise InputError(
            f"{draw.tokens} tokens have no room for words that are more common than others: ask "
            f"for {2 * min(TIMES) * size + draw.tokens - room}"
        )
    listing = common * times
    used = sum(_size(draw, next(numbers), word) for word in listing)
    for word in words:
        used += sum(_size(draw, next(numbers), word) for _ in range(RARE_TIMES))
        if used > room:
            break
        listing += [word] * RARE_TIMES
    draw.random.shuffle(listing)
    items = (ITEM.format(number=number, word=word) for number, word in enumerate(listing, 1))
    parts = tuple(common)
    return Sample(INTRO + " ".join(items), QUESTION, listed(parts), parts)


def _size(draw: Draw, number: int, word: str) -> int:
    return draw.count(f" {number}.") + draw.count(f" {word}")


COMMON_WORDS = Task("cwe", "\n".join((INTRO, ITEM, QUESTION)), make, parts_said)
