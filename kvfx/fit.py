"""What fits into a memory: the largest context, the largest batch, or the largest budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfx.compiler import raised_graph
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.memory import (
    MOST,
    check_fit,
    fitting_budget,
    is_exact,
    largest_batch,
    largest_context,
    memory_bytes,
    site_bytes,
)
from kvfx.pass_manager import Trail
from kvfx.planner import Plan, make_plan
from kvfx.policies import PerLayer, policy_named
from kvfx.policy import Allocate, Budget, Policy
from kvfx.report import aligned, fold_names, short_policy
from kvfx.sizes import parse_size, size_text

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from kvfx.calibration import Calibration

COLUMNS = ("site", "policy", "bytes")
# a plan that went over is made again so often, with a hundredth less or more
ATTEMPTS = 8


@dataclass(frozen=True)
class MemoryPlan:
    """What fits into `memory` bytes: the largest `unknown` (`"context"`, `"batch"` or `"budget"`),
    with the rest as it was given.

    `context` is the prompt of each row, None where any length fits; `new` tokens are decoded after
    it. `budget` is the fraction that was found. `asked` is the policy with it, as it is typed;
    `plan` is what it becomes for the model.
    """

    plan: Plan
    asked: Policy
    unknown: str
    memory: int
    batch: int
    context: int | None
    new: int
    budget: float | None = None

    @property
    def policy(self) -> Policy:
        """The policy of the plan."""
        return self.plan.policy

    @property
    def answer(self) -> int | float | None:
        """The value of what was unknown; None where nothing is too large."""
        return getattr(self, self.unknown)

    @property
    def sites(self) -> dict[str, int]:
        """Bytes of each site at the answer, by name."""
        length = MOST if self.context is None else self.context
        return {
            site.site.name: site_bytes(site, self.batch, length, self.new)
            for site in self.plan.sites
        }

    @property
    def bytes(self) -> int:
        """Bytes of all sites at the answer."""
        return sum(self.sites.values())

    @property
    def exact(self) -> bool:
        """Whether that is what will be allocated, and not a bound that is never exceeded."""
        return is_exact(self.plan)

    def to_dict(self) -> dict[str, object]:
        """Everything as json-able data; policies as they are typed."""
        given = ("unknown", "memory", "batch", "context", "new", "budget", "bytes", "exact")
        return {
            "policy": repr(self.policy),
            **{name: getattr(self, name) for name in given},
            "sites": [
                {"name": site.site.name, "policy": site.rule, "bytes": count, "note": site.note}
                for site, count in zip(self.plan.sites, self.sites.values(), strict=True)
            ],
        }

    def __str__(self) -> str:
        table = aligned([COLUMNS, *self._rows()], right=(len(COLUMNS) - 1,))
        return "\n".join([self.headline(), *table, self.total()])

    def render(self) -> Table:
        """The same table for a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=self.headline(),
            caption=self.total(),
            box=box.SIMPLE_HEAD,
            title_style="bold",
            title_justify="left",
            caption_justify="left",
        )
        for name in COLUMNS:
            table.add_column(name, justify="right" if name == COLUMNS[-1] else "left")
        for row in self._rows():
            table.add_row(*row)
        return table

    def headline(self) -> str:
        """One line: the policy, and what fits."""
        context = "any number of tokens" if self.context is None else f"{self.context:,} tokens"
        after = f", then {self.new:,} new ones" if self.new else ""
        found = "" if self.unknown == "budget" else f"; the largest {self.unknown}"
        return (
            f"{short_policy(self.policy)}: batch {self.batch:,}, {context}{after} in "
            f"{size_text(self.memory)}{found}"
        )

    def total(self) -> str:
        """One line: the bytes of all sites."""
        bound = "" if self.exact else ", at most: the data tell how many entries stay"
        return (
            f"all {len(self.plan.sites)} sites: {self.bytes:,} bytes ({size_text(self.bytes)}) of "
            f"{self.memory:,}{bound}"
        )

    def _rows(self) -> list[tuple[str, ...]]:
        """A row per kind of site; the bytes are those of one."""
        folded: dict[tuple[str, str], list[str]] = {}
        for site, count in zip(self.plan.sites, self.sites.values(), strict=True):
            rule = " | ".join(map(short_policy, (*site.stages, site.store)))
            folded.setdefault((rule, f"{count:,}"), []).append(site.site.name)
        return [
            (f"{fold_names(names)}{f'  x{len(names)}' if len(names) > 1 else ''}", *key)
            for key, names in folded.items()
        ]


def plan(
    model: PreTrainedModel,
    policy: Policy | str,
    *,
    memory: int | str,
    batch: int | None = None,
    context: int | None = None,
    new: int = 0,
    calibration: Calibration | None = None,
    strict: bool = True,
) -> MemoryPlan:
    """The largest context for `batch` rows (1 if neither is given), the largest batch for a
    `context`, or with both the largest budget of `policy` whose cache fits into `memory` bytes;
    `new` tokens are decoded after the context.

    `memory` counts the cache alone. Nothing is compiled or run. Raises CapacityExceeded, which
    names the least that is needed, where nothing fits.
    """
    named = policy_named(policy) if isinstance(policy, str) else policy
    return fitted(
        named,
        sites_of(model, strict=strict),
        memory,
        batch=batch,
        context=context,
        new=new,
        strict=strict,
        calibration=calibration,
    )


def sites_of(model: PreTrainedModel, *, strict: bool) -> tuple[Site, ...]:
    """What is planned for: the attention of `model`, captured and raised once."""
    return raised_graph(model, Trail(), strict=strict).sites


def fitted(
    policy: Policy,
    sites: tuple[Site, ...],
    memory: int | str,
    *,
    batch: int | None,
    context: int | None,
    new: int = 0,
    strict: bool = True,
    calibration: Calibration | None = None,
    max_length: int | None = None,
) -> MemoryPlan:
    """What `plan` finds, for the sites of a model; `max_length` is that of `compress`, where a
    budget is looked for.
    """

    def made(policy: Policy) -> Plan:
        return make_plan(policy, sites, strict=strict, calibration=calibration)

    def plan_for(budget: float) -> Plan:
        return made(policy.with_budget(budget))

    size = parse_size(memory)
    if batch is None and context is not None:
        found = made(policy)
        rows = largest_batch(found, size, context, new)
        return MemoryPlan(found, policy, "batch", size, rows, context, new)
    rows = 1 if batch is None else batch
    if context is None:
        found = made(policy)
        length = largest_context(found, size, rows, new)
        return MemoryPlan(found, policy, "context", size, rows, length, new)
    asked, allowed = policy.within(size, rows, context), size
    if asked is not None or plan_for(1.0).sites == plan_for(0.5).sites:
        # no budget to look for: it fits as it is, or not
        found = made(asked or policy)
        for _ in range(ATTEMPTS):
            # what fills bytes by itself does not know what others keep beside the entries
            over = memory_bytes(found, rows, context, new, max_length) - size
            if asked is None or over <= 0:
                break
            allowed -= max(over, size // 100)
            asked = policy.within(allowed, rows, context)
            found = made(asked or policy)
        check_fit(found, size, rows, context, new, max_length)
        return MemoryPlan(found, asked or policy, "budget", size, rows, context, new)
    budget = fitting_budget(plan_for, size, rows, context, new, max_length)
    asked = policy.with_budget(budget)
    return MemoryPlan(made(asked), asked, "budget", size, rows, context, new, budget)


def bytes_asked(policy: Policy) -> int | None:
    """The bytes that the budget of a policy allows its cache, if it is given in bytes.

    Raises PolicyError for different ones.
    """
    found = {parse_size(budget) for budget in _budgets(policy) if isinstance(budget, str)}
    if len(found) > 1:
        raise PolicyError(
            f"{policy!r}: budgets in bytes are those of the whole cache: give one, not {len(found)}"
        )
    return next(iter(found), None)


def _budgets(policy: Policy) -> list[Budget | None]:
    """The budgets that count: an allocator's where there is one, else those of select policies."""
    if isinstance(policy, PerLayer):
        return [
            each for part in (policy.default, *policy.layers.values()) for each in _budgets(part)
        ]
    parts = policy.parts()
    if len(parts) == 1 and parts[0] is policy:
        # one that fills bytes by itself needs no search
        searched = policy.within(1, 1, 1) is None
        return [getattr(policy, "budget", None)] if searched else []
    allocators = [part for part in parts if isinstance(part, Allocate)]
    return [each for part in allocators or parts for each in _budgets(part)]
