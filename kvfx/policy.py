"""What is kept and how, as data: the `Policy` base classes, one per role, and the `|` that composes
them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, CAPACITY, Buffer, Extent
from kvfx.errors import PolicyError
from kvfx.geometry import Site

ROLES = ("allocate", "select", "refine", "merge", "store", "reuse")


class Policy(ABC):
    """A published method as frozen data: it names ops, sizes buffers and fills attributes, and
    never sees a tensor.

    Subclasses are frozen dataclasses named after their method; `repr()` is valid Python.
    """

    role: ClassVar[str]
    paper: ClassVar[str] = ""

    def __or__(self, other: Policy) -> Policy:
        """Compose two policies of different roles into one."""
        return compose(self, other)

    def parts(self) -> tuple[Policy, ...]:
        """The policies that this one is composed of."""
        return (self,)

    def roles(self) -> tuple[str, ...]:
        """The roles that this policy plays."""
        return (self.role,)

    def for_site(self, site: Site, sites: int) -> Policy:
        """The policy that holds at `site` of a model with `sites` sites (combinators choose;
        methods are uniform).
        """
        del site, sites
        return self


class Store(Policy):
    """How an entry is held in memory. `room` names the kernel room whose ops the site uses.

    The ops of a room take these arguments, in this order (see `kvfx/op_table.py`):
    `store(k, v, keep, *buffers)`, `append(k, v, keep, *buffers)`, `attend(q, position_ids,
    *buffers)`,
    `extend(q, k, v, position_ids, *buffers)`, `load(*buffers)`, and `flush(*buffers)` where
    `flushes`;
    `attributes()` are their keyword arguments. `rows` says how rows to write are named: by a
    `"keep"` mask [B, K, S], or by `"positions"` [B, S]. A `croppable` format can forget its newest
    entries; one that `compacts` closes gaps in place (`compact(keep, frequencies, *buffers)`),
    others are loaded and stored anew.
    """

    role: ClassVar[str] = "store"
    room: ClassVar[str]
    rows: ClassVar[str] = "keep"
    croppable: ClassVar[bool] = False
    flushes: ClassVar[bool] = False
    compacts: ClassVar[bool] = False

    @abstractmethod
    def buffers(self, site: Site) -> dict[str, Buffer]:
        """The buffers of `site`, in the order in which the ops of the room take them."""

    def entries(self) -> Extent:
        """The most entries that buffers for `CAPACITY` hold: the length of what `load` returns."""
        return CAPACITY

    @abstractmethod
    def capacity(self, entries: int, *, bounded: bool) -> int:
        """Entries to allocate so that `entries` fit; `bounded` says that a select policy caps their
        number.
        """

    def attributes(self, site: Site) -> dict[str, int | float | str]:
        """Keyword arguments of every op of the room at `site`."""
        del site
        return {}

    def flush_due(self, length: int) -> bool:
        """Whether a row that holds `length` entries has to be flushed before the next append."""
        del length
        return False

    def constraint(self, site: Site) -> str | None:
        """Why this format cannot hold the entries of `site`, or None."""
        del site
        return None


class Select(Policy):
    """Which tokens keep an entry: at most `kept(tokens)` per KV head, and `interval` more between
    two evictions.

    `select` names the op that chooses, `score` the op that ranks (None where position alone
    decides). With a `decay`, scores are attention: decoded rows add theirs to `decay` times what
    was there before; without, they are computed anew from the entries. `pool` neighbours (mean or
    max, by `pooling`) are ranked together. With `shared`, all KV heads keep the same tokens.
    """

    role: ClassVar[str] = "select"
    select: ClassVar[str]
    score: ClassVar[str | None] = None
    shared: ClassVar[bool] = False
    decay: ClassVar[float | None] = None
    pool: int = 1
    pooling: str = "mean"
    budget: float | int
    interval: int
    positions: str

    @abstractmethod
    def attributes(self) -> dict[str, int | float | str]:
        """Keyword arguments of the `select` op."""

    def score_attributes(self, site: Site) -> dict[str, int | float | str]:
        """Keyword arguments of the `score` op at `site`."""
        del site
        return {}

    def entry_buffers(self, site: Site, entries: Extent) -> dict[str, Buffer]:
        """Numbers kept beside each entry: `score`, where attention ranks and goes on being added
        up.
        """
        if self.decay is None:
            return {}
        return {"score": Buffer((BATCH, site.kv_heads, entries), torch.float32)}

    def least(self) -> int:
        """The smallest number of entries with which the method makes sense."""
        return 1

    def allowed(self, tokens: int) -> int:
        """Entries that a prompt of `tokens` tokens may keep per KV head."""
        wanted = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * tokens)
        return max(wanted, self.least())

    def kept(self, tokens: int) -> int:
        """Entries that are there per KV head after a prompt of `tokens` tokens."""
        return min(tokens, self.allowed(tokens))

    def constraint(self, site: Site) -> str | None:
        """Why this method cannot choose among the tokens of `site`, or None."""
        if self.positions == "cache" and site.rope is None:
            return "no rotary embedding was matched: use positions='absolute'"
        return None


@dataclass(frozen=True)
class Composition(Policy):
    """Several policies of different roles, in one compiled program. Built by `a | b`."""

    policies: tuple[Policy, ...]

    def parts(self) -> tuple[Policy, ...]:
        """The single-role policies, in the order in which they were given."""
        return self.policies

    def roles(self) -> tuple[str, ...]:
        """The roles of all parts."""
        return tuple(role for policy in self.policies for role in policy.roles())

    def for_site(self, site: Site, sites: int) -> Policy:
        """Ask every part for its choice at `site`."""
        return compose(*(policy.for_site(site, sites) for policy in self.policies))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


def compose(*policies: Policy) -> Policy:
    """Combine policies of different roles; the same role twice raises a PolicyError that names
    both.
    """
    parts = tuple(part for policy in policies for part in policy.parts())
    taken: dict[str, Policy] = {}
    for part in parts:
        for role in part.roles():
            if role in taken:
                raise PolicyError(
                    f"{taken[role]!r} and {part!r} both play the role {role!r}: keep one of them"
                )
            taken[role] = part
    return parts[0] if len(parts) == 1 else Composition(parts)


def check_budget(policy: str, budget: float | int) -> None:
    """Raise a PolicyError unless `budget` is a fraction in (0, 1] or a positive count of
    entries.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise PolicyError(
            f"{policy}(budget={budget!r}): a budget is a fraction in (0, 1] or a count of entries"
        )
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise PolicyError(
            f"{policy}(budget={budget!r}): a fraction must satisfy 0 < budget <= 1; give an int "
            "for a count of entries"
        )
    if isinstance(budget, int) and budget < 1:
        raise PolicyError(f"{policy}(budget={budget!r}): a count of entries must be at least 1")


def check_choice(policy: str, field: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a PolicyError unless `value` is one of `choices`."""
    if value not in choices:
        raise PolicyError(
            f"{policy}({field}={value!r}): {field} must be one of {', '.join(map(repr, choices))}"
        )


def check_at_least(policy: str, field: str, value: int, least: int) -> None:
    """Raise a PolicyError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PolicyError(
            f"{policy}({field}={value!r}): {field} must be an integer of at least {least}"
        )
