"""The passes as steps to walk through: what each is, what it did, and the diff, layer by layer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence

from kvfx.geometry import Site
from kvfx.page.folding import differences, folded, general, parts_of, unnumbered
from kvfx.pass_manager import Pass, Step, Trail
from kvfx.report import fold_names

OUTSIDE = "outside of the layers"


def steps_data(trail: Trail, sites: Sequence[Site]) -> list[dict]:
    """The steps of a trail in order, as json-able data."""
    passes = _passes(Pass)
    return [_step(step, passes.get(step.name), sites) for step in trail.steps]


def _passes(base: type[Pass]) -> dict[str, type[Pass]]:
    """Every pass that is loaded, by name."""
    found = {}
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind):
            found[kind.name] = kind
        found.update(_passes(kind))
    return found


def _step(step: Step, kind: type[Pass] | None, sites: Sequence[Site]) -> dict:
    stats = step.statistics
    summary, _, rest = ((inspect.getdoc(kind) if kind is not None else "") or "").partition("\n\n")
    misses: dict[str, list[str]] = {}
    for miss in stats.misses:
        misses.setdefault(miss.reason, []).append(miss.at)
    parts, unchanged = _parts(step, sites)
    return {
        "name": step.name,
        "program": step.program,
        "summary": " ".join(summary.split()),
        "doc": rest,
        "levels": [kind.consumes.value, kind.produces.value] if kind is not None else [],
        "hits": [[rule, count] for rule, count in stats.hits.items()],
        "misses": [
            {"at": fold_names(at) if any(at) else "", "count": len(at), "reason": reason}
            for reason, at in misses.items()
        ],
        "nodes": [stats.nodes_before, stats.nodes_after],
        "milliseconds": round(stats.milliseconds, 1),
        "parts": parts,
        "unchanged": unchanged,
    }


def _parts(step: Step, sites: Sequence[Site]) -> tuple[list[dict], int]:
    """The diff of each kind of layer, and how many layers were left as they are."""
    if step.before == step.after:
        return [], 0
    before, after = (parts_of(text.splitlines(), sites) for text in (step.before, step.after))

    def signature(layer: str) -> object:
        texts = (before.get(layer, ()), after.get(layer, ()))
        return layer == "", *(tuple(general(line, layer) for line in text) for text in texts)

    found, unchanged = [], 0
    # what is outside of the layers comes last
    every = sorted(dict.fromkeys([*before, *after]), key=lambda layer: layer == "")
    for name, layers in folded(every, signature):
        lines = _diff(before, after, layers[0])
        if not any(line[0] in "+-" for line in lines):
            unchanged += len(layers)
            continue
        differs = [
            item["attribute"] for text in (before, after) for item in differences(text, layers)
        ]
        found.append(
            {
                "title": name or OUTSIDE,
                "count": len(layers),
                "shown": layers[0],
                "differs": list(dict.fromkeys(differs)),
                "lines": lines,
            }
        )
    return found, unchanged


def _diff(
    before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]], layer: str
) -> list[str]:
    """Every line of a layer, marked with a space, - or +."""
    old, new = ([unnumbered(line) for line in text.get(layer, ())] for text in (before, after))
    lines = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            lines += [f" {line}" for line in old[a:b]]
            continue
        lines += [f"-{line}" for line in old[a:b]]
        lines += [f"+{line}" for line in new[c:d]]
    return lines
