"""XKV: the next entry goes to the layer that gains most by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.budgets.marginal import xkv_shares
from kvfx.geometry import Site
from kvfx.policies.h2o import H2O
from kvfx.policies.layer_budgets import LayerBudgets, fraction_of, shares_by
from kvfx.policy import Allocate, Budget, Measurements, Select, check_budget


@dataclass(frozen=True)
class XKV(Allocate):
    """Keep `budget` entries on average so that the attention which all layers retain is largest.

    Source: Li et al., "XKV: Personalized KV Cache Memory Reduction for Long-Context LLM Inference".

    Exact: the greedy choice is the best one, since what is retained is concave. Different: the
    curves come from kvfx's calibration (how XKV samples its own is not published). Alone, heavy
    hitters stay.
    """

    budget: Budget = 0.25
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.05896"

    def __post_init__(self) -> None:
        check_budget("XKV", self.budget)

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> LayerBudgets:
        """The greedy choice over mean curves."""
        fraction = fraction_of(self, calibration)
        return shares_by(
            self, calibration, sites, ["retention"], lambda curves: xkv_shares(curves, fraction)
        )

    def alone(self) -> Select:
        """Heavy hitters."""
        return H2O(budget=self.budget)
