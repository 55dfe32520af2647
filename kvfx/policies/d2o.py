"""D2O: evicted tokens merge into the most similar one that stays, if they are similar enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, Buffer
from kvfx.geometry import Site
from kvfx.policy import (
    KEEP_ALL,
    Attributes,
    Budget,
    Merge,
    Policy,
    Select,
    check_at_least,
    check_budget,
    check_fraction,
)


@dataclass(frozen=True)
class D2O(Select, Merge):
    """Keep heavy hitters and the newest tokens, as H2O does, and merge each evicted token into the
    kept one of most similar key, if that similarity reaches a moving average.

    Source: Wan et al., "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference
    of Large Language Models", and its code.

    Exact: the gate starts at the mean similarity and becomes `past` times itself plus `present`
    times the new mean. `recent` is the newest tokens' share of the budget, `sinks` first tokens
    stay. `skip_layers` leaves the first two layers and the last alone, as published. Different:
    merged entries are a weighted mean (softmax of similarities, as in the paper's text; the
    published code does not normalise); each KV head has a gate of its own; tokens are evicted
    `interval` at a time; budgets are equal in all layers (the published ones follow the variance of
    attention).
    """

    budget: Budget = 0.2
    recent: float = 0.5
    sinks: int = 4
    past: float = 0.5
    present: float = 0.5
    skip_layers: bool = True
    interval: int = 64
    positions: ClassVar[str] = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.13035"
    score: ClassVar[str] = "score_columns"
    decay: ClassVar[float] = 1.0
    select: ClassVar[str] = "select_top"
    target: ClassVar[str] = "merge_nearest"
    merge: ClassVar[str] = "merge_similar"

    def __post_init__(self) -> None:
        check_budget("D2O", self.budget)
        for field in ("recent", "past", "present"):
            check_fraction("D2O", field, getattr(self, field))
        check_at_least("D2O", "sinks", self.sinks, 0)
        check_at_least("D2O", "interval", self.interval, 1)

    def roles(self) -> tuple[str, ...]:
        """It chooses what stays, and where the rest goes."""
        return ("select", "merge")

    def for_site(self, site: Site, sites: int) -> Policy:
        """The outer layers keep everything."""
        return KEEP_ALL if self.skip_layers and site.is_outer(sites) else self

    def state(self, site: Site) -> dict[str, Buffer]:
        """The gate of each head, not a number before anything was evicted."""
        return {"gate": Buffer((BATCH, site.kv_heads), torch.float32, fill=float("nan"))}

    def attributes(self) -> Attributes:
        """The sinks, and the share of the newest."""
        return {"sinks": self.sinks, "recent": 0, "share": float(self.recent)}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores."""
        return {"scale": site.scale}

    def target_attributes(self) -> Attributes:
        """How the gate moves."""
        return {"past": float(self.past), "present": float(self.present)}

    def merge_attributes(self, site: Site) -> Attributes:
        """None."""
        del site
        return {}

    def least(self) -> int:
        """The sinks and one token more."""
        return self.sinks + 1
