"""Questions about packaged text: one passage among others answers (after RULER's qa tasks, whose
data sets are not packaged).

The passages are the docstrings of Python's library, and the question is which function one of them
describes.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from kvfx.eval.tasks.haystack import fill, prose, strew
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.score import parts_said

MODULES = (
    "ast",
    "base64",
    "bisect",
    "calendar",
    "colorsys",
    "contextlib",
    "copy",
    "difflib",
    "email.utils",
    "fnmatch",
    "functools",
    "gettext",
    "glob",
    "heapq",
    "html",
    "inspect",
    "linecache",
    "locale",
    "math",
    "mimetypes",
    "pkgutil",
    "platform",
    "random",
    "shlex",
    "shutil",
    "statistics",
    "struct",
    "sysconfig",
    "tempfile",
    "textwrap",
    "threading",
    "tokenize",
    "traceback",
    "urllib.parse",
    "zlib",
)
# letters: a shorter name is a common word, a shorter summary says too little
NAME_LETTERS, SUMMARY_LETTERS, DOC_LETTERS = 6, (30, 160), 500
INTRO = "Answer the question based on the given documents."
DOCUMENT = "\nFunction {name}: {text}"
QUESTION = (
    "\nQuestion: According to the documents, which function has this description: {summary} "
    "Answer: The function is named"
)
ANSWER = " {name}"


@dataclass(frozen=True)
class Passage:
    """What the manual says about a function; `summary` is the first sentence of that."""

    name: str
    text: str
    summary: str


@cache
def passages() -> tuple[Passage, ...]:
    """Functions with a name and a summary of their own, in a fixed order."""
    found: dict[str, Passage] = {}
    for module in map(importlib.import_module, MODULES):
        for name in sorted(vars(module)):
            passage = described(module, name)
            if passage is not None:
                found.setdefault(name, passage)
    summaries = [passage.summary for passage in found.values()]
    return tuple(each for each in found.values() if summaries.count(each.summary) == 1)


def described(module: ModuleType, name: str) -> Passage | None:
    """None for what is no function of that module, and where the text gives the name away."""
    function = vars(module)[name]
    if not inspect.isroutine(function) or not re.fullmatch(r"[a-z][a-z0-9_]+", name):
        return None
    text = " ".join((inspect.getdoc(function) or "").split())
    # whole sentences, no more than a few
    summary, *more = re.split(r"(?<=[.])\s+(?=[A-Z])", text)
    while len(" ".join((summary, *more))) > DOC_LETTERS and more:
        more.pop()
    text = " ".join((summary, *more))
    least, most = SUMMARY_LETTERS
    if len(name) < NAME_LETTERS or name in text.lower() or not least <= len(summary) <= most:
        return None
    return Passage(name, text, summary)


def ask(draw: Draw) -> Sample:
    """The passage that answers at the depth that was asked for, others around it, and prose where
    there are no more of them; none of these names the answer.
    """
    chosen = draw.random.choice(passages())
    document = _document(chosen)
    hay = fill(draw, _others(draw, chosen), f"{INTRO} {document}")
    strew(hay, [draw.depth], [document])
    question = QUESTION.format(summary=chosen.summary)
    return Sample(INTRO + " ".join(hay), question, ANSWER.format(name=chosen.name), (chosen.name,))


def _others(draw: Draw, chosen: Passage) -> Iterator[str]:
    every = draw.random.sample(passages(), len(passages()))
    for passage in every:
        document = _document(passage)
        if chosen.name not in document.lower() and chosen.summary not in document:
            yield document
    for sentence in prose(draw):
        if chosen.name not in sentence.lower():
            yield sentence


def _document(passage: Passage) -> str:
    return DOCUMENT.format(name=passage.name, text=passage.text)


QUESTIONS = Task("qa", "\n".join((INTRO, DOCUMENT, QUESTION, ANSWER)), ask, parts_said)
