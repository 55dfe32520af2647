"""ZipVL: as many tokens as hold a given part of the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policy import Attributes, Select, check_at_least


@dataclass(frozen=True)
class ZipVL(Select):
    """Keep in each layer the fewest tokens that hold the part `threshold` of what the last `window`
    rows look at, the same ones in all heads: there is no budget, prompts and layers differ.

    Source: He et al., "ZipVL: Efficient Large Vision-Language Models with Dynamic Token
    Sparsification", its second version (other tokens are evicted). The published threshold is not
    known here. Different: the rows that look are the newest (published: newest and random ones);
    the prompt's attention is dense. What is kept is counted once per prompt and read back.
    """

    threshold: float = 0.975
    window: int = 32
    interval: int = 64
    budget: ClassVar[float] = 1.0
    positions: ClassVar[str] = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.08584"
    score: ClassVar[str] = "score_window"
    select: ClassVar[str] = "select_top"
    counts: ClassVar[str] = "allocate_mass"
    shared: ClassVar[bool] = True
    decay: ClassVar[float] = 1.0 - 1.0 / 32

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise PolicyError(f"ZipVL(threshold={self.threshold!r}): above 0, at most 1")
        check_at_least("ZipVL", "window", self.window, 1)
        check_at_least("ZipVL", "interval", self.interval, 1)

    def attributes(self) -> Attributes:
        """The window stays."""
        return {"sinks": 0, "recent": self.window}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores, and the rows that look."""
        return {"scale": site.scale, "window": self.window}

    def count_attributes(self) -> Attributes:
        """The part that is held, and what stays in any case."""
        return {
            "threshold": float(self.threshold),
            "sinks": 0,
            "recent": self.window,
            "least": self.least(),
        }

    def least(self) -> int:
        """The window and one token more."""
        return self.window + 1
