"""Uniform: every layer keeps as many entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.geometry import Site
from kvfx.policies.h2o import H2O
from kvfx.policies.layer_budgets import LayerBudgets
from kvfx.policy import Allocate, Budget, Measurements, Select, check_budget


@dataclass(frozen=True)
class Uniform(Allocate):
    """Keep `budget` entries in every layer: what the other allocators are measured against.

    Alone, heavy hitters stay (`H2O`).
    """

    budget: Budget = 0.25
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_budget("Uniform", self.budget)

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> LayerBudgets:
        """Equal shares."""
        del calibration
        return LayerBudgets(self.budget, (1.0,) * len(sites))

    def alone(self) -> Select:
        """Heavy hitters."""
        return H2O(budget=self.budget)
