"""Auto: tokens and bits of every layer, for the least error within a number of bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvfx.budgets.joint import FRACTIONS, joint_choice, joint_errors
from kvfx.budgets.precision import PAIRS
from kvfx.budgets.rounding import share_entries
from kvfx.cache import evaluated
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policies.h2o import H2O
from kvfx.policies.kivi import KIVI
from kvfx.policies.layer_budgets import LayerBudgets, calibrated
from kvfx.policies.per_layer import PerLayer
from kvfx.policies.window_ring import WindowRing
from kvfx.policy import (
    Allocate,
    Budget,
    Measurements,
    Policy,
    Select,
    Store,
    check_at_least,
    compose,
)
from kvfx.sizes import parse_size, size_text

# counts are rounded after the search: so often it is repeated with what they went over
ATTEMPTS = 8


@dataclass(frozen=True)
class Auto(Allocate):
    """Choose for each layer which part of its tokens stays and with how many bits, so that `batch`
    prompts of `context` tokens take at most `budget` bytes and the calibrated errors of attention
    are least. Tokens are chosen by the select policy it is composed with; alone, heavy hitters
    stay.

    The error of a choice is the sum of squares of what eviction and what quantization alone
    do to the attention of the calibration's last rows, as if they were independent. The search is
    a knapsack over layers. `group_size` and `residual` are those of `KIVI`.
    """

    budget: int | str  # pyright: ignore[reportIncompatibleVariableOverride]
    context: int
    batch: int = 1
    group_size: int = 32
    residual: int = 128
    interval: int = 64

    def __post_init__(self) -> None:
        parse_size(self.budget, "Auto(budget)")
        check_at_least("Auto", "context", self.context, 1)
        check_at_least("Auto", "batch", self.batch, 1)

    def roles(self) -> tuple[str, ...]:
        """It says how many entries stay, and in which format."""
        return ("allocate", "store")

    def with_budget(self, budget: Budget) -> Policy:
        """With other bytes; what counts entries says nothing to it."""
        return replace(self, budget=budget) if isinstance(budget, str) else self

    def within(self, memory: int, batch: int, context: int) -> Policy:
        """The same search for other bytes, rows and tokens."""
        return replace(self, budget=memory, batch=batch, context=context)

    def alone(self) -> Select:
        """Heavy hitters."""
        return H2O(budget=1.0, interval=self.interval)

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> Policy:
        """`LayerBudgets` and a `KIVI` per layer, whose buffers fit."""
        calibration, known = calibrated(self, calibration, sites)
        layers = [sites[index] for index in known]
        eviction = calibration.statistic("eviction_error")[:, known]
        # nothing evicted, no error
        eviction = torch.cat((eviction, torch.zeros_like(eviction[..., :1])), -1)
        errors = joint_errors(eviction, calibration.statistic("quantization_error")[:, known])
        sizes = torch.tensor(
            [
                [[self._bytes(site, part, pair) for pair in PAIRS] for part in (*FRACTIONS, 1.0)]
                for site in layers
            ]
        )
        most = parse_size(self.budget, "Auto(budget)") - self._rings(sites)
        least = int(sizes.flatten(1).amin(1).sum())
        limit = most
        for _ in range(ATTEMPTS):
            if limit < least:
                break
            chosen = joint_choice(errors, sizes, limit)
            found = self._policy(sites, known, chosen)
            over = self._total(found, layers) - most
            if over <= 0:
                return compose(*found)
            limit -= over
        raise PolicyError(
            f"{self!r}: the least that {self.batch} prompts of {self.context} tokens take is "
            f"about {size_text(least + self._rings(sites))}"
        )

    def _policy(
        self, sites: Sequence[Site], known: list[int], chosen: Sequence[tuple[int, int]]
    ) -> tuple[LayerBudgets, PerLayer]:
        """What a choice (part of the tokens, bits) per layer is as policies."""
        parts = [(*FRACTIONS, 1.0)[part] for part, _ in chosen]
        mean = math.fsum(parts) / len(parts)
        shares = dict(zip(known, (part / mean for part in parts), strict=True))
        stores = {
            index: self._store(PAIRS[pair]) for index, (_, pair) in zip(known, chosen, strict=True)
        }
        default = Counter(stores.values()).most_common(1)[0][0]
        others = {index: store for index, store in stores.items() if store != default}
        every = tuple(shares.get(index, 0.0) for index in range(len(sites)))
        return LayerBudgets(mean, every), PerLayer(default=default, layers=others)

    def _store(self, pair: tuple[int, int]) -> KIVI:
        k_bits, v_bits = pair
        return KIVI(
            k_bits=k_bits, v_bits=v_bits, group_size=self.group_size, residual=self.residual
        )

    def _bytes(self, site: Site, part: float, pair: tuple[int, int]) -> int:
        """Bytes of a site that keeps this part of its tokens with these bits."""
        return self._held(site, self._store(pair), math.ceil(part * self.context))

    def _total(self, found: tuple[LayerBudgets, PerLayer], layers: Sequence[Site]) -> int:
        """Bytes of the layers as they will be allocated."""
        budgets, stores = found
        shares = tuple(budgets.shares[site.index] for site in layers)
        least = self.alone().least()
        counts = share_entries(self.context, float(budgets.budget), 0, 0, least, shares)
        total = 0
        for site, count in zip(layers, counts, strict=True):
            store = stores.for_site(site, len(budgets.shares))
            assert isinstance(store, Store)
            total += self._held(site, store, count)
        return total

    def _held(self, site: Site, store: Store, entries: int) -> int:
        """Bytes of the buffers for so many entries, and the attention beside them."""
        capacity = store.capacity(entries + self.interval, bounded=True)
        assert isinstance(capacity, int)
        buffers = (*store.buffers(site).values(), store.number(site, torch.float32))
        return sum(evaluated(buffer.bytes(), self.batch, capacity) for buffer in buffers)

    def _rings(self, sites: Sequence[Site]) -> int:
        """Bytes of the sites that see a window, which are as they are."""
        total = 0
        for site in sites:
            if site.window is not None:
                ring = WindowRing(site.window)
                capacity = ring.capacity(self.context, bounded=False)
                assert isinstance(capacity, int)
                buffers = ring.buffers(site).values()
                total += sum(evaluated(buffer.bytes(), self.batch, capacity) for buffer in buffers)
        return total
