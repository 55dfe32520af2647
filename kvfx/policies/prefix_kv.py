"""PrefixKV: every layer keeps the same part of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfx.budgets.retention import bisected_shares, prefix_shares
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policies.layer_budgets import fraction_of, shares_by
from kvfx.policy import (
    Allocate,
    Attributes,
    Budget,
    Measurements,
    Policy,
    Select,
    check_at_least,
    check_budget,
    check_choice,
)


@dataclass(frozen=True)
class PrefixKV(Allocate):
    """Keep `budget` entries on average, in each layer the best ones up to one common part of the
    layer's attention: a binary search finds the part that spends the budget.

    Source: Wang et al., "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following
    Models Need for Efficient Generation" (NeurIPS 2025), and its code.

    Offline, the search is over the calibration, once; with `online=True`, over the attention of
    each prompt, on the device, at its end. `search="exact"` finds the cut by sorting, which spends
    the budget exactly and always ends; `"bisect"`, offline, by halving a threshold to within 5
    tokens, as published, and ends where no halving can help. Alone it keeps tokens as
    published (`PrefixTokens`); any method that selects can be named instead: `PrefixKV(0.25) |
    SnapKV()`.
    Different: positions stay true; during decode, entries are ranked anew every `interval` tokens
    (published: the token at a fixed place goes).
    """

    budget: Budget = 0.25
    online: bool = False
    search: str = "exact"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.03409"
    allocate: ClassVar[str] = "allocate_prefix"

    def __post_init__(self) -> None:
        check_budget("PrefixKV", self.budget)
        check_choice("PrefixKV", "search", self.search, ("exact", "bisect"))
        if self.online and self.search == "bisect":
            raise PolicyError(
                "PrefixKV(online=True, search='bisect'): on the device the search sorts: drop one"
            )

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> Policy:
        """Shares of equal retained attention, or itself where each prompt decides."""
        if self.online:
            return self
        fraction = fraction_of(self, calibration)

        def shares(curves: Tensor) -> tuple[float, ...]:
            if self.search == "exact" or calibration is None:
                return prefix_shares(curves, fraction)
            return bisected_shares(curves, fraction, calibration.tokens)

        return shares_by(self, calibration, sites, ["retention"], shares)

    def alone(self) -> Select:
        """As published."""
        return PrefixTokens(budget=self.budget)


@dataclass(frozen=True)
class PrefixTokens(Select):
    """Keep the first token, the newest and those that all rows gave most attention, the same ones
    in all heads: what `PrefixKV` keeps inside a layer.
    """

    budget: Budget = 0.25
    interval: int = 64
    positions: ClassVar[str] = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.03409"
    score: ClassVar[str] = "score_columns"
    select: ClassVar[str] = "select_top"
    shared: ClassVar[bool] = True
    decay: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_budget("PrefixTokens", self.budget)
        check_at_least("PrefixTokens", "interval", self.interval, 1)

    def attributes(self) -> Attributes:
        """The first and the newest token stay."""
        return {"sinks": 1, "recent": 1}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores."""
        return {"scale": site.scale}

    def least(self) -> int:
        """The first and the newest token."""
        return 2
