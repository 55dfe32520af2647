"""Passes, the loop that runs them, their statistics, and the trail they leave.

`KVFX_PRINT=after-all | after-change | after:<pass>` prints texts to stderr; `KVFX_DUMP=<folder>`
writes them.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from kvfx.errors import KvfxError
from kvfx.graph import Graph, Level, Miss
from kvfx.text import diff
from kvfx.verify import verify


@dataclass
class Statistics:
    """What one pass did: hits per rule, misses with reasons, nodes before and after,
    milliseconds.
    """

    hits: Counter[str] = field(default_factory=Counter)
    misses: list[Miss] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    milliseconds: float = 0.0

    def hit(self, rule: str) -> None:
        """Count one match of `rule`."""
        self.hits[rule] += 1

    def miss(self, miss: Miss) -> None:
        """Record what did not match, and why."""
        self.misses.append(miss)


@dataclass(frozen=True)
class Pass(ABC):
    """One graph-wide step: it changes the graph that it is given, and nothing else."""

    name: ClassVar[str]
    consumes: ClassVar[Level]
    produces: ClassVar[Level]

    @abstractmethod
    def run(self, graph: Graph, stats: Statistics) -> None:
        """Rewrite `graph` in place, counting hits and misses."""


@dataclass(frozen=True)
class Step:
    """One pass in the trail: its statistics and the canonical text before and after it."""

    name: str
    program: str
    statistics: Statistics
    before: str
    after: str

    def diff(self) -> str:
        """What the pass changed, as a unified diff of canonical texts."""
        return diff(
            self.before,
            self.after,
            before_name=f"before {self.name}",
            after_name=f"after {self.name}",
        )


@dataclass
class Trail:
    """The passes' record, in order. `trail["insert-cache"]` finds a pass,
    `trail["prefill/insert-cache"]` one program's.
    """

    steps: list[Step] = field(default_factory=list)

    def __getitem__(self, name: str) -> Step:
        program, _, short = name.rpartition("/")
        found = [
            step for step in self.steps if step.name == short and program in ("", step.program)
        ]
        if not found:
            known = ", ".join(
                dict.fromkeys(f"{step.program}/{step.name}".lstrip("/") for step in self.steps)
            )
            raise KeyError(f"no pass {name!r} in the trail; there are: {known}")
        return next((step for step in found if step.program == "decode"), found[-1])

    def __str__(self) -> str:
        rows = [f"{'program':8} {'pass':20} {'nodes':>13} {'ms':>8}  hits"]
        for step in self.steps:
            stats = step.statistics
            hits = ", ".join(f"{rule} {count}" for rule, count in stats.hits.items()) or "-"
            nodes = f"{stats.nodes_before} -> {stats.nodes_after}"
            rows.append(
                f"{step.program:8} {step.name:20} {nodes:>13} {stats.milliseconds:8.1f}  {hits}"
            )
            rows += [f"{'':9}miss: {miss}" for miss in stats.misses]
        return "\n".join(rows)


def replay(steps: Iterable[Step], trail: Trail) -> None:
    """Append steps that ran before, on an equal graph, and show them as if they ran now."""
    for step in steps:
        trail.steps.append(step)
        _show(step, len(trail.steps))


def run_passes(graph: Graph, passes: Iterable[Pass], trail: Trail | None) -> Graph:
    """Run `passes` in order on `graph`, checking each door, and append their record to `trail` if
    there is one.
    """
    before = graph.text if trail is not None else ""
    for step in passes:
        if graph.level is not step.consumes:
            raise KvfxError(
                f"pass {step.name!r} takes a {step.consumes.value} graph, this one is "
                f"{graph.level.value}"
            )
        stats = Statistics(nodes_before=len(graph.nodes))
        start = time.perf_counter()
        step.run(graph, stats)
        graph.clean()
        graph.level = step.produces
        stats.milliseconds = (time.perf_counter() - start) * 1e3
        stats.nodes_after = len(graph.nodes)
        verify(graph, after=step.name)
        if trail is None:
            continue
        after = graph.text
        replay([Step(step.name, graph.program, stats, before, after)], trail)
        before = after
    graph.module.recompile()
    return graph


def _show(step: Step, number: int) -> None:
    """Print or dump a step as the environment asks."""
    wanted, folder = os.environ.get("KVFX_PRINT", ""), os.environ.get("KVFX_DUMP", "")
    changed = step.before != step.after
    if (
        wanted == "after-all"
        or (wanted == "after-change" and changed)
        or wanted == f"after:{step.name}"
    ):
        sys.stderr.write(f"// after {step.name} ({step.program or 'model'})\n{step.after}\n")
    if folder:
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{number:02}-{step.program or 'model'}-{step.name}.txt").write_text(step.after)
