"""What a plan costs in bytes: exact for a batch and a length, or as a sympy expression."""

from __future__ import annotations

from collections import Counter

import sympy

from kvfx.cache import CAPACITY, evaluated
from kvfx.plan import Plan, SitePlan


def site_formula(plan: SitePlan) -> sympy.Expr:
    """Bytes of one site's buffers in `batch` and `capacity`."""
    return sympy.Add(*(buffer.bytes() for buffer in plan.buffers.values()))


def memory_bytes(plan: Plan, batch: int, length: int) -> int:
    """Bytes of all buffers after a prompt of `length` tokens per row, equal to what is allocated
    then.
    """
    return sum(site_bytes(site, batch, length) for site in plan.sites)


def site_bytes(plan: SitePlan, batch: int, length: int) -> int:
    """Bytes of one site's buffers after a prompt of `length` tokens per row."""
    capacity = plan.schedule.capacity(plan.schedule.kept(length, length), length)
    return evaluated(site_formula(plan), batch, capacity)


def memory_formula(plan: Plan) -> sympy.Expr:
    """Bytes of all buffers: sites of equal schedule share a capacity symbol (`capacity_0`,
    `capacity_1`, ...).
    """
    schedules = list(Counter(site.schedule for site in plan.sites))
    symbols = {
        schedule: sympy.Symbol(
            "capacity" if len(schedules) == 1 else f"capacity_{index}", positive=True, integer=True
        )
        for index, schedule in enumerate(schedules)
    }
    terms = [site_formula(site).subs(CAPACITY, symbols[site.schedule]) for site in plan.sites]
    return sympy.Add(*map(sympy.sympify, terms))
