"""What a user's own passes have to be, to run among those of kvfx."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from kvfx.errors import InputError
from kvfx.graph import Level
from kvfx.pass_manager import Pass

# where a user's own pass cannot stand, and what to do instead
NOT_OPEN = {
    Level.CAPTURED: "canonical ones hold the same without what export leaves behind: take those",
    Level.CACHED: "caches are inserted later, once per program: take raised ones, or say by a "
    "policy how entries are held (docs/new_policy.md)",
    Level.LOWERED: "these are made later, once per program: take raised ones",
}


def check_own(own: Sequence[Pass]) -> None:
    """Raise an InputError unless `own` are passes with names of their own that keep the level of
    canonical or raised graphs.
    """
    if not isinstance(own, (tuple, list)):
        raise InputError(f"passes={own!r} is no tuple of passes: write passes=(MyPass(),)")
    here = (kind for kind in Pass.__subclasses__() if kind.__module__.startswith("kvfx.passes."))
    taken = {kind.name for kind in here}
    for index, step in enumerate(own):
        refusal = _refusal(step, taken)
        if refusal is not None:
            raise InputError(f"passes[{index}], {step!r}: {refusal}")
        taken.add(step.name)


def _refusal(step: Pass, taken: Collection[str]) -> str | None:
    """Why a user's pass cannot run, and what to do about it."""
    if not isinstance(step, Pass):
        return "it is no pass: give an instance of a subclass of kvfx.pass_manager.Pass"
    facts = ("name", "consumes", "produces")
    unsaid = [fact for fact in facts if getattr(step, fact, None) is None]
    if unsaid:
        return f"its class does not say {', '.join(unsaid)}: set each as a ClassVar"
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", step.name):
        return f"the name {step.name!r} is not made of words and hyphens: call it 'join-silu', say"
    if step.name in taken:
        return f"there is a pass {step.name!r} already, of kvfx or before it: choose another name"
    if step.consumes is not step.produces:
        return (
            f"it makes {step.produces.value} graphs of {step.consumes.value} ones: a pass of your "
            "own keeps its level, let it produce what it consumes"
        )
    if step.consumes in NOT_OPEN:
        return f"it takes {step.consumes.value} graphs: {NOT_OPEN[step.consumes]}"
    return None
