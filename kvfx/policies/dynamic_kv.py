"""DynamicKV: layers compete for the tokens that the end of the prompt looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.budgets.marginal import dynamic_shares
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policies.layer_budgets import LayerBudgets, fraction_of, shares_by
from kvfx.policies.snapkv import SnapKV
from kvfx.policy import Allocate, Budget, Measurements, Select, check_budget


@dataclass(frozen=True)
class DynamicKV(Allocate):
    """Keep `budget` entries on average: layers get as many as they have among the tokens of all
    layers that the last rows look at most, `most` times the mean at the most.

    Source: Zhou et al., "DynamicKV: Task-Aware Adaptive KV Cache Compression for Long Context
    LLMs", and its code. Different: shares are the mean over calibration prompts, heads are averaged
    first (published: per prompt, while it is read). Alone with SnapKV's choice of tokens.
    """

    budget: Budget = 0.25
    most: float = 10.0
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.14838"

    def __post_init__(self) -> None:
        check_budget("DynamicKV", self.budget)
        if not self.most >= 1.0:
            raise PolicyError(f"DynamicKV(most={self.most!r}): at least 1")

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> LayerBudgets:
        """The layers' parts of the best tokens of all."""
        fraction = fraction_of(self, calibration)
        return shares_by(
            self,
            calibration,
            sites,
            ["window_retention"],
            lambda curves: dynamic_shares(curves, fraction, self.most),
        )

    def alone(self) -> Select:
        """What the window at the end looks at."""
        return SnapKV(budget=self.budget)
