"""What the compiler did with each site, as data and as a table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from html import escape
from typing import TYPE_CHECKING

from kvfx.graph import Graph
from kvfx.memory import site_bytes
from kvfx.ops import backend_of, name_of
from kvfx.pass_manager import Trail
from kvfx.planner import Plan, SitePlan
from kvfx.policies.full import Full
from kvfx.policy import Policy
from kvfx.provenance import origin

if TYPE_CHECKING:
    from rich.table import Table

# tokens of the prompt that "bytes per token" is measured with
LENGTH = 4096
COLUMNS = ("site", "mask", "rope", "policy", "decode ops", "bytes/token*")
FOOTNOTE = f"* cache bytes of one row after a prompt of {LENGTH:,} tokens, per token"
# characters of the longest bar
BAR = 40
# ops that every program has, whatever the policy
COMMON_OPS = ("live_rows", "linear")


@dataclass(frozen=True)
class SiteReport:
    """The choice at one site: `ops` per program with their backend, cache bytes per token before
    (dense, in the model's dtype) and after, the `entries` that a KV head keeps of a prompt of 4,096
    tokens (None where nothing is dropped, or the data tell what), and a note where the policy was
    not followed.
    """

    name: str
    mask: str
    rope: str
    heads: int
    kv_heads: int
    head_dim: int
    policy: str
    ops: dict[str, tuple[str, ...]]
    before: float
    after: float
    entries: int | None
    note: str


@dataclass(frozen=True)
class MissReport:
    """Something that a pass looked for and did not find, where, and why."""

    by: str
    at: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Sites with their rules, ops and bytes per token; misses with reasons; `print` shows a table.

    `seconds` is what `compress` or `explain` took; torch.compile works when programs first run.
    """

    policy: str
    backend: str
    programs: tuple[str, ...]
    sites: tuple[SiteReport, ...]
    misses: tuple[MissReport, ...]
    verified: bool
    seconds: float

    @property
    def before(self) -> float:
        """Bytes per token of a dense cache, over all sites."""
        return sum(site.before for site in self.sites)

    @property
    def after(self) -> float:
        """Bytes per token of this cache, over all sites."""
        return sum(site.after for site in self.sites)

    def to_dict(self) -> dict[str, object]:
        """Everything as json-able data, with the totals and the length they are measured with."""
        totals = {"before": self.before, "after": self.after, "length": LENGTH}
        return {**asdict(self), "bytes_per_token": totals}

    def __str__(self) -> str:
        table = aligned([COLUMNS, *self._rows()], right=(len(COLUMNS) - 1,))
        return "\n".join([self.headline(), *table, *self.remarks(), *self.bars()])

    def render(self) -> Table:
        """The same table for a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=self.headline(),
            caption="\n".join([*self.remarks(), *self.bars()]),
            box=box.SIMPLE_HEAD,
            padding=0,
            title_style="bold",
            title_justify="left",
            caption_justify="left",
        )
        for name in COLUMNS:
            # what is left of the width is shared by policies and ops
            wraps = name in ("policy", "decode ops")
            table.add_column(
                name, no_wrap=not wraps, justify="right" if name == COLUMNS[-1] else "left"
            )
        for row in self._rows():
            table.add_row(*row)
        return table

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        heads = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        below = "<br>".join(map(escape, self.remarks()))
        return (
            f"<p><b>{escape(self.headline())}</b></p><table><thead><tr>{heads}</tr></thead>"
            f"<tbody>{rows}</tbody></table><p>{below}</p>"
        )

    def headline(self) -> str:
        """One line about the whole: policy, sites, programs, backend, proof, time."""
        proof = "verified against the model" if self.verified else "not verified"
        return (
            f"{self.policy}: {', '.join(self.programs)}; backend {self.backend}; {proof}; "
            f"{self.seconds:.1f} s"
        )

    def remarks(self) -> list[str]:
        """What stands below the table: the total, how it was measured, and notes and misses with
        equal ones folded.
        """
        notes = [("note", site.name, site.note) for site in self.sites if site.note]
        misses = [(f"miss ({miss.by})", miss.at, miss.reason) for miss in self.misses]
        folded: dict[tuple[str, str], list[str]] = {}
        for kind, at, reason in notes + misses:
            folded.setdefault((kind, reason), []).append(at)
        return [
            self._total(),
            FOOTNOTE,
            *(
                f"{kind}: {fold_names(at)}: {reason}" if any(at) else f"{kind}: {reason}"
                for (kind, reason), at in folded.items()
            ),
        ]

    def bars(self) -> list[str]:
        """What each site that drops tokens keeps, drawn, where that differs."""
        known = [(site.name, site.entries) for site in self.sites if site.entries is not None]
        most = max((entries for _, entries in known), default=0)
        if len({entries for _, entries in known}) < 2:
            return []
        width = max(len(name) for name, _ in known)
        return [
            f"entries of each KV head after a prompt of {LENGTH:,} tokens:",
            *(
                f"{name.ljust(width)}  {'█' * max(1, round(BAR * entries / most))} {entries:,}"
                for name, entries in known
            ),
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        """A row per kind of site."""
        folded: dict[tuple[str, ...], list[str]] = {}
        for site in self.sites:
            bytes_per_token = f"{site.before:,.0f} -> {site.after:,.0f}"
            ops = ", ".join(_short(site.ops.get("decode", ())))
            key = (site.mask, site.rope or "-", site.policy, ops, bytes_per_token)
            folded.setdefault(key, []).append(site.name)
        return [
            (f"{fold_names(names)}{f'  x{len(names)}' if len(names) > 1 else ''}", *key)
            for key, names in folded.items()
        ]

    def _total(self) -> str:
        share = 100 * self.after / self.before
        return (
            f"all {len(self.sites)} sites: {self.before:,.0f} -> {self.after:,.0f} bytes/token*, "
            f"{share:.0f}% of dense"
        )


def make_report(
    plan: Plan, graphs: Mapping[str, Graph], trail: Trail, *, verified: bool, seconds: float
) -> Report:
    """The report of one compilation."""
    ops = {program: _ops_by_site(graph) for program, graph in graphs.items()}
    backends = {op.split(".")[1] for found in ops.values() for of in found.values() for op in of}
    misses = dict.fromkeys(
        MissReport(step.name, miss.at, miss.reason)
        for step in trail.steps
        for miss in step.statistics.misses
    )
    return Report(
        policy=short_policy(plan.policy),
        backend=", ".join(sorted(backends)),
        programs=tuple(graphs),
        sites=tuple(
            _site(site, {program: found.get(site.site.name, ()) for program, found in ops.items()})
            for site in plan.sites
        ),
        misses=tuple(misses),
        verified=verified,
        seconds=seconds,
    )


def short_policy(policy: Policy) -> str:
    """The policy as it is typed: fields with their default value are left out, budgets never."""
    return " | ".join(_short_part(part) for part in policy.parts())


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int]) -> list[str]:
    """Lines of columns that line up: a header, a rule, and what follows; columns `right` end
    together.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def fold_names(names: Iterable[str]) -> str:
    """Module paths that differ in numbers as one: `layers.0.attn`, `layers.1.attn` is
    `layers.0-1.attn`.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in dict.fromkeys(names):
        head, number, tail = re.fullmatch(r"(.*?)(\d*)(\D*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        numbers.setdefault((head, tail), []).extend([int(number)] if number else [])
    return ", ".join(f"{head}{_ranges(found)}{tail}" for (head, tail), found in numbers.items())


def _ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers with runs joined: 0-4, 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _site(plan: SitePlan, ops: dict[str, tuple[str, ...]]) -> SiteReport:
    site = plan.site
    parts = [plan.store] if plan.select is None else [plan.select, plan.store]
    # dense storage goes without saying where something else is chosen
    parts = [part for part in parts if part != Full()] or parts
    return SiteReport(
        name=site.name,
        mask=site.sees,
        rope="" if site.rope is None else str(site.rope),
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        policy=" | ".join(map(short_policy, parts)),
        ops=ops,
        before=0 if site.reads is not None else site.width * site.dtype.itemsize,
        after=site_bytes(plan, 1, LENGTH) / LENGTH,
        entries=_entries(plan),
        note=plan.note,
    )


def _entries(plan: SitePlan) -> int | None:
    """What a policy leaves of a prompt, where that is known before it is read."""
    known = plan.select is not None and not plan.schedule.measured
    return plan.schedule.kept(LENGTH, LENGTH) if known else None


def _ops_by_site(graph: Graph) -> dict[str, tuple[str, ...]]:
    """The kvfx ops of a program by site, each once, in the order in which they run."""
    found: dict[str, dict[str, None]] = {}
    for node in graph.nodes:
        name, mark = name_of(node.target), origin(node)
        if name is not None and mark is not None and mark.site:
            op = f"{name}.{backend_of(node.target)}"
            found.setdefault(mark.site, {})[op] = None
    return {site: tuple(ops) for site, ops in found.items()}


def _short(ops: Iterable[str]) -> list[str]:
    """The names of the ops that the policy chose."""
    names = [op.split(".")[0] for op in ops]
    return [name for name in names if name not in COMMON_OPS]


def _short_part(policy: Policy) -> str:
    known = fields(policy)  # type: ignore[arg-type]
    given = [
        field
        for field in known
        if field.name == "budget" or getattr(policy, field.name) != _default(field)
    ]
    # the first knob says what a policy with defaults only does
    shown = [
        f"{field.name}={_short_value(getattr(policy, field.name))}" for field in given or known[:1]
    ]
    return f"{type(policy).__name__}({', '.join(shown)})"


def _short_value(value: object) -> str:
    if isinstance(value, Policy):
        return short_policy(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_short_value(item)}' for key, item in value.items())}}}"
    return repr(value)


def _default(field) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()
