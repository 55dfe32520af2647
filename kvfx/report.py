"""What the compiler did with each site, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvfx.graph import Graph
from kvfx.pass_manager import Trail
from kvfx.plan import Plan


@dataclass(frozen=True)
class Report:
    """Sites, rules, ops, bytes per token before and after, misses with reasons."""

    plan: Plan


def make_report(
    plan: Plan, graphs: Mapping[str, Graph], trail: Trail, *, verified: bool, seconds: float
) -> Report:
    """The report of one compilation."""
    return Report(plan)
