"""Generated tasks, one kind per file: a text that holds the answer, a question, the answer."""

from __future__ import annotations

from kvfx.eval.tasks import (
    common_words,
    frequent_words,
    multi_key,
    multi_query,
    multi_value,
    needle,
    pass_key,
    questions,
    record,
    two_hops,
    variables,
)
from kvfx.eval.tasks.sample import Task

# one number stands in the text, and is the answer
TASKS: dict[str, Task] = {
    task.name: task for task in (needle.PROSE, needle.NOISE, needle.FOUR_KEYS)
}
# those, and every other one
ALL_TASKS: dict[str, Task] = TASKS | {
    task.name: task
    for task in (
        needle.SIXTEEN_KEYS,
        needle.UUIDS,
        multi_key.EVERYWHERE,
        multi_key.UUIDS_EVERYWHERE,
        multi_value.MULTI_VALUE,
        multi_query.MULTI_QUERY,
        variables.VARIABLES,
        common_words.COMMON_WORDS,
        frequent_words.FREQUENT_WORDS,
        questions.QUESTIONS,
        two_hops.TWO_HOPS,
        pass_key.PASS_KEY,
        record.JSON,
    )
}
