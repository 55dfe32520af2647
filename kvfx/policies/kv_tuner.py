"""KVTuner: each layer has the bits that it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.budgets.precision import EXACT, PAIRS, tuned_pairs
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policies.full import Full
from kvfx.policies.kivi import KIVI
from kvfx.policies.layer_budgets import calibrated
from kvfx.policies.per_layer import PerLayer
from kvfx.policy import Measurements, Policy

CANDIDATES = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))


@dataclass(frozen=True)
class KVTuner(Policy):
    """Quantize keys and values of each layer with as many bits as lower the error most, `bits` on
    average: a choice among `pairs` of (key bits, value bits) for every layer, by the calibration.

    Source: Li et al., "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization
    for Efficient and Nearly Lossless LLM Inference" (ICML 2025), and its code.

    Different: the search is an exact knapsack over the layers' errors of attention, summed to the
    `power` (published: groups of layers, searched by a model's answers). `exact` layers are not
    quantized; their 16 bits count. `group_size`, `residual` and `mode` are those of `KIVI`.
    """

    bits: float = 3.25
    pairs: tuple[tuple[int, int], ...] = CANDIDATES
    exact: tuple[int, ...] = ()
    power: int = 2
    group_size: int = 32
    residual: int = 128
    mode: str = "window"
    role: ClassVar[str] = "store"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.04420"

    def __post_init__(self) -> None:
        if not self.pairs or not set(self.pairs) <= set(PAIRS):
            raise PolicyError(f"KVTuner(pairs={self.pairs!r}): pairs of 2, 4 or 8 bits")
        least = min(sum(pair) for pair in self.pairs) / 2
        if not self.bits >= least:
            raise PolicyError(f"KVTuner(bits={self.bits!r}): the pairs have {least} bits or more")
        if self.power < 1:
            raise PolicyError(f"KVTuner(power={self.power!r}): at least 1")

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> Policy:
        """One `KIVI` per layer."""
        calibration, known = calibrated(self, calibration, sites)
        exact = [
            known.index(layer % len(sites)) for layer in self.exact if layer % len(sites) in known
        ]
        errors = calibration.statistic("quantization_error")[:, known]
        chosen = tuned_pairs(errors, self.bits, pairs=self.pairs, exact=exact, power=self.power)
        stores = {layer: self.store(pair) for layer, pair in zip(known, chosen, strict=True)}
        default = Counter(stores.values()).most_common(1)[0][0]
        others = {layer: store for layer, store in stores.items() if store != default}
        return PerLayer(default=default, layers=others)

    def store(self, pair: tuple[int, int]) -> Policy:
        """The format of a layer with these bits."""
        if pair == EXACT:
            return Full()
        return KIVI(
            k_bits=pair[0],
            v_bits=pair[1],
            group_size=self.group_size,
            residual=self.residual,
            mode=self.mode,
        )
