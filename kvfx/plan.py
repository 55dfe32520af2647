"""What the compiler decided for each site, as data: format, selection, schedule, capacity."""

from __future__ import annotations

from dataclasses import dataclass

from kvfx.cache import Buffer
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.geometry import Site, Unproven
from kvfx.policies.full import Full
from kvfx.policies.masked_dense import MaskedDense
from kvfx.policies.window_ring import WindowRing
from kvfx.policy import Policy, Select, Store


@dataclass(frozen=True)
class Schedule:
    """When the entries of a site are evicted or flushed: a function of counts that the host knows.

    Sites with equal schedules hold equally many entries at all times, so the host keeps one count
    for all of them.
    """

    store: Store
    select: Select | None

    def kept(self, tokens: int) -> int:
        """Entries of a row after a prompt of `tokens` tokens."""
        return tokens if self.select is None else self.select.kept(tokens)

    def limit(self, tokens: int) -> int | None:
        """Entries at which a row is compacted, or None where nothing is ever evicted."""
        return None if self.select is None else self.select.allowed(tokens) + self.select.interval

    def compacted(self, entries: int, tokens: int) -> int:
        """Entries of a row after a run of the compact program."""
        limit = self.limit(tokens)
        if self.select is None or limit is None or entries < limit:
            return entries
        return self.select.allowed(tokens)

    def due(self, entries: int, tokens: int) -> bool:
        """Whether a row of `entries` entries after a prompt of `tokens` tokens is to be compacted
        now.
        """
        limit = self.limit(tokens)
        return self.store.flush_due(entries) or (limit is not None and entries >= limit)

    def capacity(self, entries: int, tokens: int) -> int:
        """Entries to allocate for a row that holds `entries` now or after the next step."""
        limit = self.limit(tokens)
        if limit is None:
            return self.store.capacity(entries, bounded=False)
        return self.store.capacity(max(entries, limit), bounded=True)


@dataclass(frozen=True)
class SitePlan:
    """The choice for one site. `note` says why it differs from the policy, where it does."""

    site: Site
    store: Store
    select: Select | None
    note: str = ""

    @property
    def entry_buffers(self) -> dict[str, Buffer]:
        """Numbers kept beside each entry, by what they are."""
        if self.select is None:
            return {}
        return self.select.entry_buffers(self.site, self.store.entries())

    @property
    def buffers(self) -> dict[str, Buffer]:
        """All buffers of this site, those of its store first."""
        return {**self.store.buffers(self.site), **self.entry_buffers}

    @property
    def schedule(self) -> Schedule:
        """When this site is compacted."""
        return Schedule(self.store, self.select)

    @property
    def methods(self) -> str:
        """The names of the methods at this site."""
        return " | ".join(
            type(policy).__name__ for policy in (self.select, self.store) if policy is not None
        )

    @property
    def rule(self) -> str:
        """The policies of this site, as they are typed."""
        return " | ".join(
            repr(policy) for policy in (self.select, self.store) if policy is not None
        )


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
    def croppable(self) -> bool:
        """Whether the newest entries can be forgotten everywhere."""
        return all(site.store.croppable and site.select is None for site in self.sites)


def make_plan(policy: Policy, sites: tuple[Site, ...], *, strict: bool = True) -> Plan:
    """Decide what each site does under `policy`.

    Sliding-window sites keep a ring of their window. A site that a policy cannot serve raises
    UnsupportedShape, or stays `Full()` with a note when `strict` is False.
    """
    return Plan(policy, tuple(_plan_site(policy, site, len(sites), strict) for site in sites))


def _plan_site(policy: Policy, site: Site, sites: int, strict: bool) -> SitePlan:
    if isinstance(site.mask, Unproven):
        note = f"dense, the model computes the mask: {site.mask.reason}"
        return SitePlan(site, MaskedDense(), None, note)
    if site.window is not None:
        return SitePlan(
            site,
            WindowRing(site.window),
            None,
            f"the model sees {site.window} tokens: lossless ring",
        )
    parts = policy.for_site(site, sites).parts()
    store = next((part for part in parts if isinstance(part, Store)), Full())
    select = next((part for part in parts if isinstance(part, Select)), None)
    unknown = [part for part in parts if not isinstance(part, (Store, Select))]
    if unknown:
        raise PolicyError(
            f"{site.name}: {unknown[0]!r} plays a role that this version cannot compile"
        )
    for part in (store, select):
        reason = None if part is None else part.constraint(site)
        if reason is None:
            continue
        if strict:
            raise UnsupportedShape(
                f"{site.name}: {part!r} does not fit: {reason} (strict=False keeps such sites "
                "dense)"
            )
        return SitePlan(site, Full(), None, f"dense: {reason}")
    return SitePlan(site, store, select)
