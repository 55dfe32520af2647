"""Another policy for some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policy import Budget, Policy


@dataclass(frozen=True)
class PerLayer(Policy):
    """Use `layers[i]` at the i-th site and `default` everywhere else; negative indices count from
    the last site.

    `PerLayer(default=KIVI(bits=2), layers={0: Full(), -1: Full()})` keeps the first and the last
    layer exact.
    """

    default: Policy
    layers: Mapping[int, Policy] = field(default_factory=dict)

    def roles(self) -> tuple[str, ...]:
        """The roles that are played at some layer."""
        policies = (self.default, *self.layers.values())
        return tuple(dict.fromkeys(role for policy in policies for role in policy.roles()))

    def with_budget(self, budget: Budget) -> Policy:
        """The policy of every layer with another budget."""
        layers = {index: policy.with_budget(budget) for index, policy in self.layers.items()}
        return PerLayer(self.default.with_budget(budget), layers)

    def for_site(self, site: Site, sites: int) -> Policy:
        """The policy of one layer; a layer that the model does not have raises a PolicyError."""
        for index in self.layers:
            if not -sites <= index < sites:
                raise PolicyError(
                    f"PerLayer: layer {index} does not exist, the model has {sites} sites"
                )
        chosen = {index % sites: policy for index, policy in self.layers.items()}.get(
            site.index, self.default
        )
        return chosen.for_site(site, sites)

    def __hash__(self) -> int:
        return hash((self.default, tuple(sorted(self.layers.items(), key=lambda item: item[0]))))
