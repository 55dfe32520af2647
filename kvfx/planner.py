"""What the compiler decided for each site, as data: format, selection, schedule, capacity."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from kvfx.budgets.rounding import share_entries
from kvfx.cache import Buffer, Count, at_least, deferred
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.geometry import Site, Unproven
from kvfx.policies.flat_dense import FlatDense
from kvfx.policies.full import Full
from kvfx.policies.layer_budgets import LayerBudgets
from kvfx.policies.masked_dense import MaskedDense
from kvfx.policies.window_ring import WindowRing
from kvfx.policy import (
    NUMBERS,
    Allocate,
    Divide,
    Measurements,
    Merge,
    Policy,
    Refine,
    Reuse,
    Select,
    Stage,
    Store,
    compose,
    known_budget,
)


@dataclass(frozen=True)
class Share:
    """How much of a budget for several layers one of them keeps: number `layer` of `shares`."""

    shares: tuple[float, ...]
    layer: int

    def allowed(self, tokens: Count, select: Select) -> Count:
        """Entries that the layer may keep of a prompt of `tokens` tokens, where the layers may keep
        what `select` says on average: `kvfx.share_entries` on the host.
        """
        budget, protected = known_budget(select.budget), select.protected()
        entries, fraction = (budget, 1.0) if isinstance(budget, int) else (0, budget)
        held = protected["sinks"] + protected["recent"]

        def count(tokens: int) -> int:
            return _counts(tokens, fraction, entries, held, select.least(), self.shares)[self.layer]

        return deferred(f"entries_{self.layer}", count, tokens)


# asked for every layer at every step
_counts = functools.lru_cache(maxsize=1024)(share_entries)


@dataclass(frozen=True)
class Schedule:
    """When the entries of a site are evicted or flushed: a function of counts that the host knows.

    Sites with equal schedules hold equally many entries at all times, so the host keeps one count
    for all of them. Where only the data tell how many entries stay, each site has its own count,
    read back after every compression; `tokens` is then what was read last.
    """

    store: Store
    select: Select | None
    share: Share | None = None
    site: int | None = None

    @property
    def measured(self) -> bool:
        """Whether counts are read back."""
        return self.site is not None

    def kept(self, rows: int, tokens: int) -> int:
        """Entries of a row after the first `rows` of a prompt of `tokens` tokens."""
        if self.select is None or self.measured:
            return rows
        return self.select.keeps(rows, self.allowed(tokens))

    def allowed(self, tokens: Count) -> Count:
        """Entries that a row may keep."""
        assert self.select is not None
        if self.share is None:
            return self.select.allowed(tokens)
        return self.share.allowed(tokens, self.select)

    def limit(self, tokens: Count) -> Count | None:
        """Entries at which a row is compacted, or None where nothing is ever evicted."""
        if self.select is None:
            return None
        return (tokens if self.measured else self.allowed(tokens)) + self.select.interval

    def compacted(self, entries: int, tokens: int) -> int:
        """Entries of a row after a run of the compact program."""
        limit = self.limit(tokens)
        if self.select is None or limit is None or entries < limit or self.measured:
            return entries
        return self.select.keeps(entries, self.allowed(tokens))

    def due(self, entries: int, tokens: int) -> bool:
        """Whether a row of `entries` entries after a prompt of `tokens` tokens is to be compacted
        now.
        """
        limit = self.limit(tokens)
        return self.store.flush_due(entries) or (limit is not None and entries >= limit)

    def capacity(self, entries: Count, tokens: Count) -> Count:
        """Entries to allocate for a row that holds `entries` now or after the next step."""
        limit = self.limit(tokens)
        if limit is None:
            return self.store.capacity(entries, bounded=False)
        return self.store.capacity(at_least(entries, limit), bounded=True)

    def most(self, max_length: int) -> int:
        """Entries to allocate for a row of at most `max_length` tokens, however many it may hold
        beyond those that it needs now.
        """
        return self.store.capacity(max_length, bounded=True)


@dataclass(frozen=True)
class SitePlan:
    """The choice for one site, one policy per role. `note` says why it differs from what was asked
    for, where it does. A site that `reads` another one's cache, by index, has no buffers.
    """

    site: Site
    store: Store
    select: Select | None = None
    share: Share | None = None
    allocate: Allocate | None = None
    divide: Divide | None = None
    refine: Refine | None = None
    merge: Merge | None = None
    note: str = ""
    reads: int | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The policies that work on rows before they are stored, in the order in which they do."""
        every = (self.select, self.allocate, self.divide, self.refine, self.merge)
        return tuple(dict.fromkeys(stage for stage in every if stage is not None))

    @property
    def attention(self) -> Select | Merge | None:
        """The policy that asks for the attention which entries get, decoded rows' included."""
        asks = (self.select, self.merge)
        return next((part for part in asks if part is not None and part.decay is not None), None)

    @property
    def numbers(self) -> dict[str, Buffer]:
        """What is kept beside each entry, by name."""
        names = dict.fromkeys(name for stage in self.stages for name in stage.numbers)
        if self.site.slopes is not None and self.select is not None:
            # what heads lose by distance needs positions once entries have moved
            names["position"] = None
        return {name: self.store.number(self.site, NUMBERS[name]) for name in names}

    @property
    def buffers(self) -> dict[str, Buffer]:
        """All buffers of this site: those of its store, of its entries, and of its stages."""
        if self.reads is not None:
            return {}
        state = {name: buf for stage in self.stages for name, buf in stage.state(self.site).items()}
        return {**self.store.buffers(self.site), **self.numbers, **state}

    @property
    def schedule(self) -> Schedule:
        """When this site is compacted."""
        measured = self.allocate is not None or (self.select is not None and self.select.measured)
        owner = self.site.index if self.reads is None else self.reads
        return Schedule(self.store, self.select, self.share, owner if measured else None)

    @property
    def methods(self) -> str:
        """The names of the methods at this site."""
        return " | ".join(type(policy).__name__ for policy in (*self.stages, self.store))

    @property
    def rule(self) -> str:
        """The policies of this site, as they are typed."""
        return " | ".join(map(repr, (*self.stages, self.store)))


@dataclass(frozen=True)
class Plan:
    """The choices for all sites of a model, from one policy."""

    policy: Policy
    sites: tuple[SitePlan, ...]

    @property
    def compacts(self) -> bool:
        """Whether any site ever flushes or evicts."""
        return any(site.select is not None or site.store.flushes for site in self.sites)

    @property
    def selects(self) -> bool:
        """Whether any site drops entries."""
        return any(site.select is not None for site in self.sites)

    @property
    def masked(self) -> bool:
        """Whether any site needs the model's own mask over the whole history."""
        return any(isinstance(site.site.mask, Unproven) for site in self.sites)

    @property
    def chunked(self) -> bool:
        """Whether any site sees its own block of positions only."""
        return any(site.site.chunk is not None for site in self.sites)

    @property
    def croppable(self) -> bool:
        """Whether the newest entries can be forgotten everywhere."""
        return all(site.store.croppable and site.select is None for site in self.sites)


def make_plan(
    policy: Policy,
    sites: tuple[Site, ...],
    *,
    strict: bool = True,
    calibration: Measurements | None = None,
) -> Plan:
    """Decide what each site does under `policy`, as the `calibration` of the model says where the
    policy asks for one.

    Sliding-window sites keep a ring of their window. A site that a policy cannot serve raises
    UnsupportedShape, or stays `Full()` with a note when `strict` is False.
    """
    allocate = next((part for part in policy.parts() if isinstance(part, Allocate)), None)
    if allocate is not None and "select" not in policy.roles():
        policy = compose(policy, allocate.alone())
    policy = policy.resolve(calibration, sites)
    plans = [_plan_site(policy, site, len(sites), strict) for site in sites]
    budgets = next((part for part in policy.parts() if isinstance(part, LayerBudgets)), None)
    if budgets is not None:
        chosen = [
            index
            for index, plan in enumerate(plans)
            if plan.select is not None and plan.site.reads is None
        ]
        shares = budgets.shares_of([sites[index] for index in chosen], len(sites))
        for layer, index in enumerate(chosen):
            plans[index] = replace(plans[index], share=Share(shares, layer))
    return Plan(policy, tuple(_reader(plan, plans) for plan in plans))


def _reader(plan: SitePlan, plans: list[SitePlan]) -> SitePlan:
    """The plan of a site, which is that of another one where it has the keys and values of that
    one, and they stay where they are.
    """
    if plan.site.reads is None:
        return plan
    owner = plans[plan.site.reads]
    if isinstance(owner.site.mask, Unproven) or (
        owner.select is not None and owner.select.positions == "cache"
    ):
        return plan
    note = f"reads the cache of {owner.site.name}"
    return replace(owner, site=plan.site, reads=owner.site.index, note=note)


def _plan_site(policy: Policy, site: Site, sites: int, strict: bool) -> SitePlan:
    if isinstance(site.mask, Unproven):
        note = f"dense, the model computes the mask: {site.mask.reason}"
        return SitePlan(site, MaskedDense(), note=note)
    if site.window is not None:
        note = f"the model sees {site.window} tokens: lossless ring"
        return SitePlan(site, WindowRing(site.window), note=note)
    if site.chunk is not None:
        note = f"the model sees chunks of {site.chunk} tokens: lossless ring"
        return SitePlan(site, WindowRing(site.chunk), note=note)
    plan = _assign_roles(policy, policy.for_site(site, sites), site)
    reasons = [(part, part.constraint(site)) for part in (*plan.stages, plan.store)]
    reasons += [(policy, _conflict(plan))]
    for part, reason in reasons:
        if reason is None:
            continue
        if strict:
            raise UnsupportedShape(
                f"{site.name}: {part!r} does not fit: {reason} (strict=False keeps such sites "
                "dense)"
            )
        return SitePlan(site, Full(), note=f"dense: {reason}")
    return plan


def _assign_roles(everywhere: Policy, policy: Policy, site: Site) -> SitePlan:
    """Who plays which role at a site, where `policy` is left of what holds `everywhere`; what is
    left out is left as it is.
    """
    parts = policy.parts()
    if "select" in everywhere.roles() and "select" not in policy.roles():
        # a site that its method leaves alone has nothing to divide, refine or merge
        parts = tuple(part for part in parts if isinstance(part, Store))
    store = next((part for part in parts if isinstance(part, Store)), Full())
    select = next((part for part in parts if isinstance(part, Select)), None)
    divide = next((part for part in parts if isinstance(part, Divide)), None)
    refine = next((part for part in parts if isinstance(part, Refine)), None)
    merge = next((part for part in parts if isinstance(part, Merge)), None)
    allocate = next((part for part in parts if isinstance(part, Allocate)), None)
    unknown = [part for part in parts if not isinstance(part, (Store, Stage, Reuse))]
    if unknown:
        raise PolicyError(
            f"{site.name}: {unknown[0]!r} plays a role that this version cannot compile"
        )
    if refine is not None and select is None:
        select = refine.alone()
    if allocate is not None and select is not None:
        if select.measured:
            raise PolicyError(
                f"{site.name}: {allocate!r} divides a budget, and {select!r} has none, since it "
                "counts what each prompt needs: keep one of them"
            )
        given, select = select, select.with_budget(allocate.budget)
        # a method that merges as well plays both roles
        if merge is given and isinstance(select, Merge):
            merge = select
    if select is not None and not select.measured:
        known_budget(select.budget)
    for part in (divide, merge):
        if part is not None and select is None:
            raise PolicyError(
                f"{site.name}: {part!r} needs a policy that selects: H2O() | {part!r}, say"
            )
    ragged = divide is not None or (select is not None and select.ragged)
    if ragged and isinstance(store, Full):
        store = FlatDense()
    online = allocate if allocate is not None and allocate.online else None
    return SitePlan(site, store, select, None, online, divide, refine, merge)


def _conflict(plan: SitePlan) -> str | None:
    """Why the policies of a site cannot work together, or None."""
    select, store, merge = plan.select, plan.store, plan.merge
    if select is None:
        return None
    if store.rebuilds:
        return "heads share what K and V are computed from: none of it can be dropped for one head"
    ragged = plan.divide is not None or select.ragged
    if ragged and not store.ragged:
        return f"heads that keep different numbers of tokens need a dense cache, not {store!r}"
    if merge is not None and merge.votes and not store.biased:
        return f"votes are added to scores, which attention over {store!r} cannot do"
    if (plan.divide is not None or plan.refine is not None) and select.score is None:
        return f"{type(select).__name__} ranks no tokens: choose a method that scores them"
    if (plan.divide is not None or plan.refine is not None) and select.select != "select_top":
        return f"{type(select).__name__} has a rule of its own for what stays"
    return None
