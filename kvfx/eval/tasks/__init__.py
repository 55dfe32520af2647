"""Generated tasks, one file each: a text that holds the answer, a question, the answer."""

from __future__ import annotations

from kvfx.eval.tasks import needle
from kvfx.eval.tasks.sample import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (needle.PROSE, needle.NOISE, needle.FOUR_KEYS)
}
