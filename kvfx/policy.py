"""What is kept and how, as data: the `Policy` base classes, one per role, and the `|` that composes
them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from kvfx.cache import BATCH, CAPACITY, Buffer, Count, Extent, at_least, budgeted
from kvfx.errors import InputError, PolicyError
from kvfx.geometry import Site
from kvfx.sizes import parse_size

ROLES = ("allocate", "select", "divide", "refine", "merge", "store", "reuse")

# a fraction of the tokens, a count of entries, or what all buffers may take: "512MiB"
Budget = float | int | str

# what may be known about each entry besides its key and value; votes are the log of the number of
# tokens that an entry stands for
NUMBERS = {"score": torch.float32, "position": torch.int32, "votes": torch.float32}


class Measurements(Protocol):
    """What was measured of a model (`kvfx.calibrate`): statistics [P, L, ...] of prompts and
    sites by name, NaN where nothing was; `tokens` is the length of the prompts.
    """

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the model's sites."""
        ...

    @property
    def tokens(self) -> int:
        """The most tokens of a prompt."""
        ...

    def statistic(self, name: str) -> Tensor:
        """One statistic."""
        ...


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

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> Policy:
        """The policy that needs no calibration any more: what was measured has become its numbers.

        Raises CalibrationError where a calibration is needed and none is given.
        """
        del calibration, sites
        return self

    def with_budget(self, budget: Budget) -> Policy:
        """The policy with another budget, wherever it has one."""
        known = cast(Any, self)
        has_one = "budget" in {field.name for field in dataclasses.fields(known)}
        return dataclasses.replace(known, budget=budget) if has_one else self

    def within(self, memory: int, batch: int, context: int) -> Policy | None:
        """The policy that fills so many bytes with `batch` prompts of `context` tokens, if it finds
        that itself; None where a budget has to be searched for.
        """
        del memory, batch, context
        return None

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
    others are loaded and stored anew. In a `ragged` format the heads of a row share their memory
    and may hold different numbers of entries. A `biased` one adds the votes of entries to scores.
    One that `rebuilds` holds rows of what K and V are computed from (`Site.latent`), in place of k
    and v; it has no ops `attend`, `extend` and `load`. With `absorb`, decode attends to these rows.
    """

    role: ClassVar[str] = "store"
    room: ClassVar[str]
    rows: ClassVar[str] = "keep"
    croppable: ClassVar[bool] = False
    flushes: ClassVar[bool] = False
    compacts: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    biased: ClassVar[bool] = False
    rebuilds: ClassVar[bool] = False
    absorb: bool = False

    @abstractmethod
    def buffers(self, site: Site) -> dict[str, Buffer]:
        """The buffers of `site`, in the order in which the ops of the room take them."""

    def number(self, site: Site, dtype: torch.dtype) -> Buffer:
        """A buffer of one number per entry, in the order of the entries."""
        return Buffer((BATCH, site.kv_heads, self.entries()), dtype)

    def entries(self) -> Extent:
        """The most entries that buffers for `CAPACITY` hold: the length of what `load` returns."""
        return CAPACITY

    @abstractmethod
    def capacity(self, entries: Count, *, bounded: bool) -> Count:
        """Entries to allocate so that `entries` fit; `bounded` says that a select policy caps their
        number. Never fewer for more.
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


Attributes = dict[str, int | float | str | None]


class Stage(Policy):
    """A policy that works on rows before they are stored.

    Its ops take the operands that their schemas name: the rows' `k`, `v` [B, K, T, D], `live`
    [B, K, T], `position` [B, K, T] (None in a prompt, whose heads hold the same tokens), `score`,
    `count` [B, K], `keep`, `target`, `weight`, `votes`; in a prompt also `q` [B, H, S, D],
    `position_ids` [B, S] and the site's rotary `frequencies`; and the stage's own `state`.
    """

    @property
    def numbers(self) -> tuple[str, ...]:
        """What it has to know about each entry later: names of `NUMBERS`."""
        return ()

    def state(self, site: Site) -> dict[str, Buffer]:
        """Buffers that belong to a conversation and not to its entries."""
        del site
        return {}

    def constraint(self, site: Site) -> str | None:
        """Why this method cannot work on the tokens of `site`, or None."""
        del site
        return None


class Select(Stage):
    """Which tokens keep an entry: at most `kept(tokens)` per KV head, and `interval` more between
    two evictions.

    `select` names the op that chooses, `score` the op that ranks (None where position alone
    decides). With a `decay`, scores are attention: decoded rows add theirs to `decay` times what
    was there before; without, they are computed anew from the entries. `observe` names the op that
    computes what else `score` needs, its `state`, from the queries of a prompt. `rank` names the op
    that turns scores into ranks; `pool` neighbours (mean or max, by `pooling`) are ranked together.
    With `shared`, all KV heads keep the same tokens. Where the data decide how many stay
    (`measured`), no budget is read: `counts` names the op that says how many.
    """

    role: ClassVar[str] = "select"
    select: ClassVar[str]
    score: ClassVar[str | None] = None
    observe: ClassVar[str | None] = None
    rank: ClassVar[str | None] = None
    counts: ClassVar[str | None] = None
    shared: ClassVar[bool] = False
    decay: ClassVar[float | None] = None
    pool: int = 1
    pooling: str = "mean"
    budget: Budget
    interval: int
    positions: str

    @property
    def measured(self) -> bool:
        """Whether only the data tell how many entries stay."""
        return self.counts is not None

    @property
    def ragged(self) -> bool:
        """Whether heads of a row may keep different numbers of entries."""
        return self.measured and not self.shared

    @property
    def numbers(self) -> tuple[str, ...]:
        """The attention that entries got so far, where that ranks them."""
        return () if self.decay is None else ("score",)

    @abstractmethod
    def attributes(self) -> Attributes:
        """Keyword arguments of the `select` op."""

    def score_attributes(self, site: Site) -> Attributes:
        """Keyword arguments of the `score` op at `site`."""
        del site
        return {}

    def count_attributes(self) -> Attributes:
        """Keyword arguments of the `counts` op."""
        return {}

    def observe_attributes(self, site: Site) -> Attributes:
        """Keyword arguments of the `observe` op at `site`."""
        del site
        return {}

    def with_budget(self, budget: Budget) -> Select:
        """The same method with another budget, if it has one."""
        return cast(Select, super().with_budget(budget))

    def protected(self) -> dict[str, Any]:
        """The rows that always stay: `sinks`, `recent`, and the `share` of the count that is for
        the newest.
        """
        given = self.attributes()
        return {
            "sinks": given.get("sinks", 0),
            "recent": given.get("recent", 0),
            "share": given.get("share", 0.0),
        }

    def least(self) -> int:
        """The smallest number of entries with which the method makes sense."""
        return 1

    def allowed(self, tokens: Count) -> Count:
        """Entries that a prompt of `tokens` tokens may keep per KV head: never fewer of more."""
        return at_least(budgeted(known_budget(self.budget), tokens), self.least())

    def keeps(self, rows: int, allowed: int) -> int:
        """How many of `rows` rows stay where `allowed` may, per KV head."""
        return min(rows, allowed)

    def kept(self, tokens: int) -> int:
        """Entries that are there per KV head after a prompt of `tokens` tokens."""
        return self.keeps(tokens, self.allowed(tokens))

    def constraint(self, site: Site) -> str | None:
        """Why this method cannot choose among the tokens of `site`, or None."""
        if self.positions == "cache" and site.rope is None:
            return "no rotary embedding was matched: use positions='absolute'"
        return None


class Allocate(Stage):
    """How many entries each layer keeps, `budget` on average.

    At compile time it resolves to `LayerBudgets`. One that is `online` decides at the end of each
    prompt, from the scores of all layers: `allocate` names the op. A select policy says which
    entries stay; its own budget is not read.
    """

    role: ClassVar[str] = "allocate"
    allocate: ClassVar[str]
    budget: Budget

    @property
    def online(self) -> bool:
        """Whether the prompt decides."""
        return False

    def state(self, site: Site) -> dict[str, Buffer]:
        """What the first prompt allowed each head [B, K], and how many tokens it had [B, 1]."""
        if not self.online:
            return {}
        return {
            "allowed": Buffer((BATCH, site.kv_heads), torch.int64),
            "asked": Buffer((BATCH, 1), torch.int64),
        }

    def allocate_attributes(self, select: Select) -> Attributes:
        """Keyword arguments of the `allocate` op, for what `select` keeps."""
        return {**select.protected(), "least": select.least()}

    @abstractmethod
    def alone(self) -> Select:
        """What selects where no select policy is named."""


class Divide(Stage):
    """How the entries that a row may keep are divided among its KV heads: `divide` names the op.

    It takes the score and the count of an even division.
    """

    role: ClassVar[str] = "divide"
    divide: ClassVar[str]

    @abstractmethod
    def attributes(self, select: Select) -> Attributes:
        """Keyword arguments of the `divide` op, for what `select` keeps."""


class Refine(Stage):
    """Which other tokens stay in place of some that a select policy chose: `refine` names the op.

    It takes the score and what was chosen, and keeps as many.
    """

    role: ClassVar[str] = "refine"
    refine: ClassVar[str]

    @abstractmethod
    def attributes(self, select: Select) -> Attributes:
        """Keyword arguments of the `refine` op, for what `select` chose."""

    @abstractmethod
    def alone(self) -> Select:
        """What is refined where no select policy is named."""


class Merge(Stage):
    """Where the rows go that keep no entry of their own: `merge` names the op that returns new keys
    and values.

    `target` names the op that says into which row each row goes; a select policy that is a merge
    policy as well may choose targets itself (None). `summed` are numbers that entries inherit from
    all their rows. One that asks for attention names its `score` op and `decay`, for select
    policies that do not; `averaged`, it is that per row which saw the token. With `votes` entries
    count as often as they stand for tokens. With `turned`, keys are merged at the position of their
    target.
    """

    role: ClassVar[str] = "merge"
    target: ClassVar[str | None] = None
    merge: ClassVar[str]
    score: ClassVar[str | None] = None
    decay: ClassVar[float | None] = None
    averaged: ClassVar[bool] = False
    summed: ClassVar[tuple[str, ...]] = ()

    @property
    def votes(self) -> bool:
        """Whether the score of an entry gains the log of the tokens that it stands for."""
        return False

    @property
    def turned(self) -> bool:
        """Whether keys are merged before rotation."""
        return False

    def score_attributes(self, site: Site) -> Attributes:
        """Keyword arguments of the `score` op at `site`."""
        del site
        return {}

    def target_attributes(self) -> Attributes:
        """Keyword arguments of the `target` op."""
        return {}

    @abstractmethod
    def merge_attributes(self, site: Site) -> Attributes:
        """Keyword arguments of the `merge` op at `site`."""


class Reuse(Policy):
    """Where keys and values of a prompt come from, besides computing them: from earlier prompts
    (`kvfx.reuse`). The cache afterwards is that of the other policies.

    `finds` says what is looked for in a store of segments: the `"prefix"` of the prompt; whole
    `"pieces"` of it; any `"fragments"`; a `"similar"` prompt; or texts for the slots of a template,
    with what `"anchors"` say about them. Of each reused piece, `leading` rows are computed again.
    With a `check`, all rows are computed up to the site `layer`, ranked there by that rule, and the
    part `ratio` of the reused ones, the worst, is computed to the end. While decoding, each step
    computes up to `repairs` rows again.
    """

    role: ClassVar[str] = "reuse"
    finds: ClassVar[str]
    check: ClassVar[str | None] = None
    leading: int = 0
    ratio: float = 0.0
    layer: int = 1
    repairs: int = 0

    @property
    def approximate(self) -> bool:
        """Whether rows may differ from what the whole prompt would have made of them."""
        return self.finds != "prefix"


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

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> Policy:
        """Resolve every part."""
        return compose(*(policy.resolve(calibration, sites) for policy in self.policies))

    def with_budget(self, budget: Budget) -> Policy:
        """Every part with another budget."""
        return compose(*(policy.with_budget(budget) for policy in self.policies))

    def within(self, memory: int, batch: int, context: int) -> Policy | None:
        """What the part that divides memory itself becomes, with the others."""
        found = [policy.within(memory, batch, context) for policy in self.policies]
        if not any(found):
            return None
        pairs = zip(found, self.policies, strict=True)
        return compose(*(policy if new is None else new for new, policy in pairs))

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


def check_budget(policy: str, budget: Budget) -> None:
    """Raise a PolicyError unless `budget` is a fraction in (0, 1], a positive count of entries, or
    a size in bytes.
    """
    rule = "a budget is a fraction in (0, 1], a count of entries, or bytes such as '512MiB'"
    if isinstance(budget, str):
        try:
            parse_size(budget)
        except InputError as error:
            raise PolicyError(f"{policy}(budget={budget!r}): {rule}") from error
        return
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise PolicyError(f"{policy}(budget={budget!r}): {rule}")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise PolicyError(
            f"{policy}(budget={budget!r}): a fraction must satisfy 0 < budget <= 1; give an int "
            "for a count of entries"
        )
    if isinstance(budget, int) and budget < 1:
        raise PolicyError(f"{policy}(budget={budget!r}): a count of entries must be at least 1")


def known_budget(budget: Budget) -> float | int:
    """A budget that says how many entries stay; one in bytes raises a PolicyError."""
    if isinstance(budget, str):
        raise PolicyError(
            f"budget={budget!r}: how many entries these bytes hold depends on what is read: say "
            "for how many rows and tokens, compress(..., batch=, context=)"
        )
    return budget


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


# leaves a site as it is
KEEP_ALL = Composition(())


def check_fraction(policy: str, field: str, value: object) -> None:
    """Raise a PolicyError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise PolicyError(f"{policy}({field}={value!r}): {field} must be a number from 0 to 1")
