"""A user's own passes: where they stand, and which are refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest

from kvfx.errors import InputError
from kvfx.graph import Level
from kvfx.pass_manager import Pass
from kvfx.passes.pipeline import raise_passes


@dataclass(frozen=True)
class Spell(Pass):
    """A user's own pass of canonical graphs."""

    name: ClassVar[str] = "spell"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph, stats):
        """Change nothing."""


class SpellMore(Spell):
    name = "spell-more"


class Look(Spell):
    """A user's own pass of raised graphs."""

    name = "look"
    consumes = produces = Level.RAISED


def test_own_passes_stand_where_their_level_is():
    passes = raise_passes((Look(), Spell(), SpellMore()))
    names = [step.name for step in passes]
    first, last = names.index("match-positions"), names.index("match-attention")
    assert names[first + 1 : last] == ["spell", "spell-more"]
    assert names[names.index("match-rope") + 1] == "look"
    assert [name for name in names if name not in ("look", "spell", "spell-more")] == [
        step.name for step in raise_passes()
    ]
    for before, after in itertools.pairwise(passes):
        assert before.produces is after.consumes, f"{before.name} -> {after.name}"


def given(**facts) -> Pass:
    """An instance of a pass that differs from `Spell` in what its class says."""
    return type("Given", (Spell,), facts)()


def levels(consumes: Level, produces: Level) -> Pass:
    return given(consumes=consumes, produces=produces)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (Spell(), r"passes=Spell\(\) is no tuple of passes: write"),
        ((Spell,), r"passes\[0\], <class .*Spell'>: it is no pass: give an instance"),
        ((given(name=None),), "does not say name: set each as a ClassVar"),
        ((given(produces=None),), "does not say produces: set each as a ClassVar"),
        ((given(name="a/b"),), "'a/b' is not made of words and hyphens: call it"),
        ((given(name="match-attention"),), "a pass 'match-attention' already, of kvfx or before"),
        ((given(name="insert-cache"),), "a pass 'insert-cache' already, of kvfx or before it"),
        ((given(name="insert-reuse"),), "a pass 'insert-reuse' already, of kvfx or before it"),
        ((Spell(), Spell()), r"passes\[1\], Spell\(\): there is a pass 'spell' already"),
        (
            (levels(Level.CANONICAL, Level.RAISED),),
            "it makes raised graphs of canonical ones: a pass of your own keeps its level",
        ),
        ((levels(Level.CAPTURED, Level.CAPTURED),), "takes captured graphs: canonical ones hold"),
        ((levels(Level.CACHED, Level.CACHED),), "takes cached graphs: .* take raised ones"),
        ((levels(Level.LOWERED, Level.LOWERED),), "takes lowered graphs: .* take raised ones"),
    ],
)
def test_own_passes_that_cannot_run_are_refused(own, message):
    with pytest.raises(InputError, match=message):
        raise_passes(own)
