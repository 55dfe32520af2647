"""SqueezeAttention: layers that change little keep little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.budgets.squeeze import squeeze_shares
from kvfx.errors import CalibrationError, PolicyError
from kvfx.geometry import Site
from kvfx.policies.h2o import H2O
from kvfx.policies.layer_budgets import LayerBudgets, shares_by
from kvfx.policy import Allocate, Budget, Measurements, Select, check_at_least, check_budget


@dataclass(frozen=True)
class SqueezeAttention(Allocate):
    """Keep `budget` entries on average; of `groups` groups of layers, the one whose attention
    changes the residual stream least keeps `part` of that, the others what it gives up.

    Source: Wang et al., "SqueezeAttention: 2D Management of KV-Cache in LLM Inference via
    Layer-wise Optimal Budget". Its abstract speaks of two groups, its text of three, with parts of
    0.3 to 0.4. Different: similarities come from the calibration (published: each prompt). Alone,
    heavy hitters stay.
    """

    budget: Budget = 0.25
    groups: int = 3
    part: float = 0.35
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.04793"

    def __post_init__(self) -> None:
        check_budget("SqueezeAttention", self.budget)
        check_at_least("SqueezeAttention", "groups", self.groups, 2)
        if not 0.0 <= self.part <= 1.0:
            raise PolicyError(f"SqueezeAttention(part={self.part!r}): from 0 to 1")

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> LayerBudgets:
        """The groups' budgets."""
        if calibration is not None and bool(calibration.statistic("similarity").isnan().all()):
            raise CalibrationError(f"{self!r}: no residual stream was found in this model")
        return shares_by(
            self,
            calibration,
            sites,
            ["similarity"],
            lambda similarity: squeeze_shares(similarity, self.groups, self.part),
        )

    def alone(self) -> Select:
        """Heavy hitters."""
        return H2O(budget=self.budget)
