"""A small record, given early in the text and asked for as JSON: format and facts count."""

from __future__ import annotations

import json

from kvfx.eval.tasks.haystack import fill, prose, strew
from kvfx.eval.tasks.needle import DIGITS
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.words import ADJECTIVES, NOUNS

# of the whole text: the record stands before
EARLY = 0.2
INTRO = "Read the following text and memorize the record in it.\n"
RECORD = (
    "The record of order {order} says that the item is {item}, the state is {state}, the price is "
    "{price} and the stock is {stock}."
)
QUESTION = (
    '\nGive the record of the order above as one JSON object with the keys "order", "item", '
    '"state", "price" and "stock", numbers as numbers. JSON:'
)
ANSWER = " {record}"


def hide(draw: Draw) -> Sample:
    """The record in prose, within the first fifth of it."""
    random = draw.random
    record = {
        "order": random.randrange(10 ** (DIGITS - 1), 10**DIGITS),
        "item": random.choice(NOUNS),
        "state": random.choice(ADJECTIVES),
        "price": random.randrange(100, 1000),
        "stock": random.randrange(10, 100),
    }
    line = RECORD.format(**record)
    hay = fill(draw, prose(draw), f"{INTRO} {line}")
    strew(hay, [EARLY * draw.depth], [line])
    parts = tuple(json.dumps({key: value}) for key, value in record.items())
    answer = ANSWER.format(record=json.dumps(record))
    return Sample(INTRO + " ".join(hay), QUESTION, answer, parts)


def fields_kept(text: str, sample: Sample) -> float:
    """The share of fields that the first JSON object of `text` holds, equal in value and type; a
    field that was not asked for counts as a wrong one, and what cannot be parsed as nothing.
    """
    try:
        found, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    except ValueError:
        return 0.0
    expected = set(sample.parts)
    given = {json.dumps({key: value}) for key, value in found.items()}
    return len(given & expected) / len(given | expected)


JSON = Task("json", "\n".join((INTRO, RECORD, QUESTION, ANSWER)), hide, fields_kept)
