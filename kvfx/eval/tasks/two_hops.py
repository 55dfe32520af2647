"""Questions whose answer takes two passages (in place of RULER's qa_2, whose data set is not
packaged).

The question describes a module of Python's library; one passage says which module that is, another
one which function is in it.
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
from kvfx.eval.tasks.questions import (
    ANSWER,
    INTRO,
    MODULES,
    SUMMARY_LETTERS,
    Passage,
    described,
)
from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.tasks.score import parts_said, says

# beside those that `qa` asks about
MORE_MODULES = (
    "binascii",
    "cmath",
    "code",
    "codeop",
    "compileall",
    "dis",
    "doctest",
    "fileinput",
    "gc",
    "getopt",
    "getpass",
    "importlib.util",
    "io",
    "ipaddress",
    "logging",
    "operator",
    "pickletools",
    "pprint",
    "pyclbr",
    "reprlib",
    "secrets",
    "smtplib",
    "socket",
    "subprocess",
    "sys",
    "tarfile",
    "time",
    "timeit",
    "tracemalloc",
    "types",
    "unicodedata",
    "urllib.request",
    "uuid",
    "warnings",
    "weakref",
    "webbrowser",
    "xml.sax.saxutils",
    "zipfile",
)
MODULE = "\nModule {name}: {summary}"
FUNCTION = "\nFunction {name} of module {module}: {text}"
QUESTION = (
    "\nQuestion: According to the documents, which function is in the module that has this "
    "description: {summary} Answer: The function is named"
)


@dataclass(frozen=True)
class Module:
    """A module and its functions; `summary` is the first sentence of what its manual says, None
    where that names the module.
    """

    name: str
    summary: str | None
    functions: tuple[Passage, ...]

    def documents(self) -> Iterator[str]:
        """What is said about the module and about its functions."""
        if self.summary is not None:
            yield MODULE.format(name=self.name, summary=self.summary)
        for each in self.functions:
            yield FUNCTION.format(name=each.name, module=self.name, text=each.text)


@cache
def modules() -> tuple[Module, ...]:
    """All modules in a fixed order."""
    return tuple(read_module(importlib.import_module(name)) for name in (*MODULES, *MORE_MODULES))


@cache
def askable() -> tuple[tuple[str, Module], ...]:
    """Modules that have a summary and a function, behind their summaries; no two have the same."""
    return tuple(
        (module.summary, module)
        for module in modules()
        if module.summary is not None and module.functions
    )


def ask(draw: Draw) -> Sample:
    """The passage that names the function at the depth that was asked for, the one that names the
    module anywhere; others around them, and prose where there are no more. None of these names
    the module or the function.
    """
    summary, module = draw.random.choice(askable())
    chosen = draw.random.choice(module.functions)
    answering = FUNCTION.format(name=chosen.name, module=module.name, text=chosen.text)
    bridge = MODULE.format(name=module.name, summary=summary)
    depths = [draw.depth, draw.random.random()]
    others = _others(draw, module.name, chosen.name)
    hay = fill(draw, others, " ".join((INTRO, answering, bridge)))
    strew(hay, depths, [answering, bridge])
    question = QUESTION.format(summary=summary)
    return Sample(INTRO + " ".join(hay), question, ANSWER.format(name=chosen.name), (chosen.name,))


def read_module(module: ModuleType) -> Module:
    """The public functions, those that it lists or else those that it defines, but none that the
    summary names.
    """
    name, members, summary = module.__name__, vars(module), _summary(module)
    listed = members.get("__all__")
    public = (
        sorted(set(listed) & set(members))
        if listed is not None
        else [each for each in sorted(members) if _home(members[each]) == name]
    )
    found = (described(module, each) for each in public)
    said = "" if summary is None else summary.lower()
    functions = tuple(each for each in found if each is not None and each.name not in said)
    return Module(name, summary, functions)


def _others(draw: Draw, module: str, function: str) -> Iterator[str]:
    documents = [document for each in modules() for document in each.documents()]
    draw.random.shuffle(documents)
    for texts in (documents, prose(draw)):
        for text in texts:
            if not says(text, module) and function not in text.lower():
                yield text


def _home(member: object) -> str | None:
    return getattr(member, "__module__", None)


def _summary(module: ModuleType) -> str | None:
    """None for what is too short or too long, and where it gives the name away."""
    paragraph = re.split(r"\n\s*\n", inspect.getdoc(module) or "")[0]
    summary = re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(paragraph.split()))[0]
    least, most = SUMMARY_LETTERS
    told = any(part in summary.lower() for part in module.__name__.split("."))
    return None if told or not least <= len(summary) <= most else summary


TEMPLATE = "\n".join((INTRO, MODULE, FUNCTION, QUESTION, ANSWER))
TWO_HOPS = Task("qa-2-hops", TEMPLATE, ask, parts_said)
