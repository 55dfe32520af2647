"""CAKE: layers whose attention is spread, or moves, keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.budgets.cake import cake_shares
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policies.layer_budgets import LayerBudgets, shares_by
from kvfx.policies.snapkv import SnapKV
from kvfx.policy import Allocate, Budget, Measurements, Select, check_budget


@dataclass(frozen=True)
class CAKE(Allocate):
    """Keep `budget` entries on average, in proportion to entropy^(1 / tau1) times variance^(1 /
    tau2) of the last rows' attention.

    Source: Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences"
    (ICLR 2025), and its code. Different: shares are the mean over calibration prompts (published:
    per prompt, layer by layer); the published temperatures differ from model to model and are not
    known here. Alone with SnapKV's choice of tokens.
    """

    budget: Budget = 0.25
    tau1: float = 1.0
    tau2: float = 1.0
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.12491"

    def __post_init__(self) -> None:
        check_budget("CAKE", self.budget)
        if not (self.tau1 > 0.0 and self.tau2 > 0.0):
            raise PolicyError(f"CAKE(tau1={self.tau1!r}, tau2={self.tau2!r}): both are positive")

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> LayerBudgets:
        """The layers' preferences."""
        return shares_by(
            self,
            calibration,
            sites,
            ["entropy", "variance"],
            lambda spread, moves: cake_shares(spread, moves, self.tau1, self.tau2),
        )

    def alone(self) -> Select:
        """What the window at the end looks at."""
        return SnapKV(budget=self.budget)
