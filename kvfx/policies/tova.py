"""TOVA: the tokens that the newest one looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.geometry import Site
from kvfx.policy import Attributes, Budget, Select, check_at_least, check_budget, check_choice


@dataclass(frozen=True)
class TOVA(Select):
    """Keep the `budget` tokens to which the newest one gives most attention, averaged over all
    heads of a layer, which keep the same tokens.

    Source: Oren et al., "Transformers are Multi-State RNNs", section 3.2.

    Exact: the weights of the last row, in fp32. Different: the newest token itself always stays,
    and tokens are evicted `interval` at a time (published: 1), by the row before the eviction.
    """

    budget: Budget = 0.25
    interval: int = 64
    positions: str = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.06104"
    score: ClassVar[str] = "score_window"
    select: ClassVar[str] = "select_top"
    shared: ClassVar[bool] = True
    decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_budget("TOVA", self.budget)
        check_at_least("TOVA", "interval", self.interval, 1)
        check_choice("TOVA", "positions", self.positions, ("cache", "absolute"))

    def attributes(self) -> Attributes:
        """The newest token stays."""
        return {"sinks": 0, "recent": 1}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores; one row looks."""
        return {"scale": site.scale, "window": 1}
