"""ExpectedAttention: the tokens that future queries will look at, were they like past ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, Buffer
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policy import Attributes, Budget, Select, check_at_least, check_budget


@dataclass(frozen=True)
class ExpectedAttention(Select):
    """Keep the `budget` tokens that get most attention on average from queries with the mean and
    covariance of the prompt's, rotated over the next `future` positions, times the length of their
    values.

    Source: Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from
    Future Queries Distribution", and its code in kvpress.

    Exact: statistics of the queries before rotation, without the first `sinks` tokens, which always
    stay; fp32. `spread=False` leaves the covariance out, `value_norm=False` the values; `epsilon`
    is added to the expected weight. During decode, entries are ranked anew every `interval` tokens
    by the statistics of the first prompt of the conversation (published: the prompt only).
    """

    budget: Budget = 0.25
    sinks: int = 4
    future: int = 512
    spread: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    interval: int = 64
    positions: ClassVar[str] = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.00636"
    observe: ClassVar[str] = "query_statistics"
    score: ClassVar[str] = "score_expected"
    select: ClassVar[str] = "select_top"

    def __post_init__(self) -> None:
        check_budget("ExpectedAttention", self.budget)
        for field, least in (("sinks", 0), ("future", 1), ("interval", 1)):
            check_at_least("ExpectedAttention", field, getattr(self, field), least)
        if not self.epsilon >= 0.0:
            raise PolicyError(f"ExpectedAttention(epsilon={self.epsilon!r}): at least 0")

    def state(self, site: Site) -> dict[str, Buffer]:
        """The mean [B, H, D] and the covariance [B, H, D, D] of future queries."""
        shape = (BATCH, site.heads, site.head_dim)
        return {
            "mean": Buffer(shape, torch.float32),
            "covariance": Buffer((*shape, site.head_dim), torch.float32),
        }

    def attributes(self) -> Attributes:
        """The sinks."""
        return {"sinks": self.sinks, "recent": 0}

    def observe_attributes(self, site: Site) -> Attributes:
        """How queries were rotated, and how far they will be."""
        assert site.rope is not None
        return {"style": site.rope.style, "sinks": self.sinks, "future": self.future}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores, and what goes into them."""
        return {
            "scale": site.scale,
            "epsilon": float(self.epsilon),
            "spread": self.spread,
            "value_norm": self.value_norm,
        }

    def least(self) -> int:
        """The sinks and one token more."""
        return self.sinks + 1

    def constraint(self, site: Site) -> str | None:
        """Queries are rotated back: their rotation has to be known."""
        return None if site.rope is not None else "no rotary embedding was matched"
