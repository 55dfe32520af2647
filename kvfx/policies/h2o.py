"""H2O: the tokens that got most attention so far, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policy import Attributes, Budget, Select, check_at_least, check_budget, check_choice


@dataclass(frozen=True)
class H2O(Select):
    """Keep the heavy hitters, which all rows so far gave most attention, and the newest tokens:
    `budget` in total, of which the share `recent` is for the newest.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models", algorithm 1; published with 10% heavy hitters and 10% recent tokens.

    Exact: the column sums of the prompt's attention, from the log-sum-exp, in fp32; decoded rows go
    on adding theirs. Different: heads of a group share their entries, so their scores are summed;
    tokens are evicted `interval` at a time (published: 1).
    """

    budget: Budget = 0.2
    recent: float = 0.5
    interval: int = 64
    positions: str = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"
    score: ClassVar[str] = "score_columns"
    select: ClassVar[str] = "select_top"
    decay: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_budget("H2O", self.budget)
        if not 0.0 <= self.recent <= 1.0:
            raise PolicyError(f"H2O(recent={self.recent!r}): a share of the budget, from 0 to 1")
        check_at_least("H2O", "interval", self.interval, 1)
        check_choice("H2O", "positions", self.positions, ("cache", "absolute"))

    def attributes(self) -> Attributes:
        """The share of the newest."""
        return {"sinks": 0, "recent": 0, "share": self.recent}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores."""
        return {"scale": site.scale}
