"""MEDA: layers whose attention is spread keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.budgets.meda import meda_shares
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policies.h2o import H2O
from kvfx.policies.layer_budgets import LayerBudgets, shares_by
from kvfx.policy import Allocate, Budget, Measurements, Select, check_budget


@dataclass(frozen=True)
class MEDA(Allocate):
    """Keep `budget` entries on average, in proportion to exp(entropy / temperature) of a layer's
    attention.

    Source: Wan et al., "MEDA: Dynamic KV Cache Allocation for Efficient Multimodal Long-Context
    Inference" (NAACL 2025). Different: the entropy is that of text looking at text (published:
    between text and images), and only the allocation is MEDA's. Alone, heavy hitters stay.
    """

    budget: Budget = 0.25
    temperature: float = 1.0
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.17599"

    def __post_init__(self) -> None:
        check_budget("MEDA", self.budget)
        if not self.temperature > 0.0:
            raise PolicyError(f"MEDA(temperature={self.temperature!r}): positive")

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> LayerBudgets:
        """A softmax over layers."""
        return shares_by(
            self,
            calibration,
            sites,
            ["entropy"],
            lambda entropy: meda_shares(entropy, self.temperature),
        )

    def alone(self) -> Select:
        """Heavy hitters."""
        return H2O(budget=self.budget)
