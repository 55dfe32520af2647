"""The pass that finds what K and V of each site are computed from, where that is narrower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvfx.absorb import is_linear
from kvfx.cuts import Cut, Tokens, find_cut
from kvfx.geometry import Site
from kvfx.graph import Graph, Level, Miss
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import origin
from kvfx.rebuild import refute, structure


@dataclass(frozen=True)
class MatchLatents(Pass):
    """Learn the narrowest tensors that each site's K and V are computed from token by token; the
    graph stays as it is.

    They are a minimum cut in bytes per token, and what is computed from them is run on some tokens
    alone. Sites where nothing is narrower than K and V are left as they are.

    Before:  k = cat([linear(latent, w1), expand(key)]);  v = linear(latent, w2)
    After:   the same graph; site.latent = (512, 64), and graph.cuts says how k and v come about
    """

    name: ClassVar[str] = "match-latents"
    consumes: ClassVar[Level] = Level.RAISED
    produces: ClassVar[Level] = Level.RAISED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Record the cut of each site in `graph.cuts`, and its widths in the site."""
        tokens = Tokens(graph)
        attentions = {
            mark.site: node
            for node in graph.calls(torch.ops.kvfx.attention.default)
            if (mark := origin(node)) is not None
        }
        known: dict[tuple[object, ...], Miss | None] = {}
        sites = []
        for site in graph.sites:
            cut = find_cut(tokens, attentions[site.name])
            if isinstance(cut, Cut) and sum(cut.widths) < site.width:
                key = structure(graph, cut)
                if key not in known:
                    known[key] = refute(graph, cut, site.dtype, site.device)
                cut = cut if known[key] is None else known[key]
            sites.append(_recorded(graph, site, cut, stats))
        graph.sites = tuple(sites)


def _recorded(graph: Graph, site: Site, cut: Cut | Miss | None, stats: Statistics) -> Site:
    if not isinstance(cut, Cut):
        assert cut is not None
        stats.miss(Miss(cut.reason, site.name))
        return site
    if sum(cut.widths) >= site.width:
        stats.hit("nothing narrower")
        return site
    graph.cuts[site.name] = cut
    stats.hit(f"latent {' + '.join(map(str, cut.widths))} of {site.width}")
    linear = is_linear(graph, cut, site.dtype, site.device)
    return replace(site, latent=cut.widths, linear=linear)
