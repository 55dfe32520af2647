"""WeightedKV: keys are evicted, their values merge into the next token that stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.geometry import Site
from kvfx.policy import Attributes, Budget, Merge, Select, check_at_least, check_budget


@dataclass(frozen=True)
class WeightedKV(Select, Merge):
    """Drop the keys of the tokens that got least attention on average, and let the next kept token
    take in their values, weighted by that attention.

    Source: Yuan et al., "WeightedKV: Attention Scores Weighted Key-Value Cache Merging for Large
    Language Models".

    Exact: the average is over the rows that saw the token; a run of evicted tokens ends up as
    if merged one after the other. `sinks` and `recent` tokens always stay (their published numbers
    are not known here). The kept token inherits the attention as well. Different: tokens are
    evicted `interval` at a time, ranked by what they got themselves.
    """

    budget: Budget = 0.25
    sinks: int = 4
    recent: int = 32
    interval: int = 64
    positions: ClassVar[str] = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.01330"
    score: ClassVar[str] = "score_columns"
    decay: ClassVar[float] = 1.0
    rank: ClassVar[str] = "average_attention"
    select: ClassVar[str] = "select_top"
    target: ClassVar[str] = "merge_next"
    merge: ClassVar[str] = "merge_weighted"
    summed: ClassVar[tuple[str, ...]] = ("score",)

    def __post_init__(self) -> None:
        check_budget("WeightedKV", self.budget)
        for field, least in (("sinks", 0), ("recent", 1), ("interval", 1)):
            check_at_least("WeightedKV", field, getattr(self, field), least)

    def roles(self) -> tuple[str, ...]:
        """It chooses what stays, and where the rest goes."""
        return ("select", "merge")

    @property
    def numbers(self) -> tuple[str, ...]:
        """Attention, and positions, which tell how many rows gave it."""
        return ("score", "position")

    def attributes(self) -> Attributes:
        """The protected tokens."""
        return {"sinks": self.sinks, "recent": self.recent}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores."""
        return {"scale": site.scale}

    def merge_attributes(self, site: Site) -> Attributes:
        """None."""
        del site
        return {}

    def least(self) -> int:
        """The protected tokens and one more."""
        return self.sinks + self.recent + 1
