"""KVMerger: runs of similar keys become one entry each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from kvfx.errors import PolicyError
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
    check_choice,
    check_fraction,
    known_budget,
)

SIGMAS = ("dist", "fixed", "rms", "two_step", "literal")


@dataclass(frozen=True)
class KVMerger(Select, Merge):
    """Merge runs of adjacent tokens with similar keys: each becomes one entry, a mean of its keys
    and of its values under a Gaussian around the key that got most attention.

    Source: Wang et al., "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on
    Long-Context Tasks", sections 4.1 (merging sets) and 4.2 (Gaussian kernel).

    `mode="exact"` merges the most similar neighbours until `budget` entries are left in each head;
    `mode="threshold"` is the published rule, every pair with a cosine above `threshold`, however
    many entries that leaves. `recent` and `heavy` are the shares of the prompt that stay unmerged,
    the newest and the most attended (published: 0.17 and 0.12 at half the cache, 0.08 and 0.02 at
    35%, if the printed percentages are shares); so do `sinks` first tokens.
    `sigma="dist"` makes the kernel as wide as the mean distance (the printed formula, `"literal"`,
    keeps the pivot alone; `"fixed"` uses `width`, published best: 5). `value_scale="paper"`
    multiplies values by the size of the set; `"votes"` adds its log to scores instead, which is
    exact for equal keys; `"none"` does neither. `linkage="anchor"` compares with the first key of a
    set instead of the neighbour (threshold mode). `rotation="before"` merges keys at the position
    of their pivot, `"after"` as they were cached. `skip_layers` leaves the first two layers and the
    last alone and merges the others more.
    Not published: merging during decode, which happens here every `interval` tokens; entries then
    weigh as many tokens as they stand for.
    """

    budget: Budget = 0.5
    mode: str = "exact"
    threshold: float = 0.75
    sinks: int = 4
    recent: float = 0.17
    heavy: float = 0.12
    sigma: str = "dist"
    width: float = 5.0
    value_scale: str = "none"
    linkage: str = "chain"
    rotation: str = "after"
    skip_layers: bool = False
    interval: int = 64
    positions: ClassVar[str] = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.08454"
    score: ClassVar[str] = "score_columns"
    decay: ClassVar[float] = 1.0
    select: ClassVar[str] = "merge_sets"
    merge: ClassVar[str] = "merge_gaussian"
    summed: ClassVar[tuple[str, ...]] = ("score", "votes")

    def __post_init__(self) -> None:
        check_budget("KVMerger", self.budget)
        check_choice("KVMerger", "mode", self.mode, ("exact", "threshold"))
        check_choice("KVMerger", "sigma", self.sigma, SIGMAS)
        check_choice("KVMerger", "value_scale", self.value_scale, ("none", "paper", "votes"))
        check_choice("KVMerger", "linkage", self.linkage, ("chain", "anchor"))
        check_choice("KVMerger", "rotation", self.rotation, ("after", "before"))
        check_at_least("KVMerger", "sinks", self.sinks, 0)
        check_at_least("KVMerger", "interval", self.interval, 1)
        for field in ("recent", "heavy"):
            check_fraction("KVMerger", field, getattr(self, field))
        if not self.width > 0.0:
            raise PolicyError(f"KVMerger(width={self.width!r}): width must be positive")
        if self.linkage == "anchor" and self.mode == "exact":
            raise PolicyError("KVMerger(linkage='anchor') needs mode='threshold'")
        if self.skip_layers and isinstance(self.budget, int):
            raise PolicyError(
                f"KVMerger(budget={self.budget!r}, skip_layers=True): give the budget as a fraction"
            )

    def roles(self) -> tuple[str, ...]:
        """It chooses what stays, and where the rest goes."""
        return ("select", "merge")

    def for_site(self, site: Site, sites: int) -> Policy:
        """With `skip_layers`, what the outer layers keep is taken from the others."""
        if not self.skip_layers:
            return self
        if site.is_outer(sites):
            return KEEP_ALL
        outer = min(3, sites)
        rest = (known_budget(self.budget) * sites - outer) / max(1, sites - outer)
        if self.mode == "exact" and rest <= 0.0:
            raise PolicyError(
                f"{self!r}: {outer} of {sites} layers kept whole are more than the budget"
            )
        return dataclasses.replace(self, budget=rest, skip_layers=False)

    @property
    def measured(self) -> bool:
        """A threshold alone does not tell how many entries stay."""
        return self.mode == "threshold"

    @property
    def numbers(self) -> tuple[str, ...]:
        """Attention, the tokens that an entry stands for, and its position where keys turn."""
        return ("score", "votes", "position") if self.turned else ("score", "votes")

    @property
    def votes(self) -> bool:
        """Whether attention counts entries by their tokens."""
        return self.value_scale == "votes"

    @property
    def turned(self) -> bool:
        """Whether keys are merged before rotation."""
        return self.rotation == "before"

    def attributes(self) -> Attributes:
        """Which rows may merge."""
        return {
            "threshold": float(self.threshold) if self.measured else None,
            "sinks": self.sinks,
            "recent": float(self.recent),
            "heavy": float(self.heavy),
            "linkage": self.linkage,
        }

    def protected(self) -> dict[str, Any]:
        """The sinks; `recent` and `heavy` are parts of the prompt."""
        return {"sinks": self.sinks, "recent": 0, "share": 0.0}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores."""
        return {"scale": site.scale}

    def merge_attributes(self, site: Site) -> Attributes:
        """The kernel, and whether values grow with their set."""
        del site
        scaled = self.value_scale == "paper"
        return {"sigma": self.sigma, "width": float(self.width), "scaled": scaled}

    def least(self) -> int:
        """The sinks and one entry for the rest."""
        return self.sinks + 1

    def constraint(self, site: Site) -> str | None:
        """Keys turn only where their rotation is known."""
        if self.turned and site.rope is None:
            return "no rotary embedding was matched: use rotation='after'"
        return None
