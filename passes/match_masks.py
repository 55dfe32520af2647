"""The pass that proves which rows a mask lets see which keys, and then drops the mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx

from kvfx.constants import add_constant
from kvfx.geometry import Causal, Chunk, Window
from kvfx.graph import Graph, Level, Miss, call, replace
from kvfx.mask_proof import prove_mask
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import Stamp, origin
from kvfx.visibility import MaskFact


@dataclass(frozen=True)
class MatchMasks(Pass):
    """Replace each proven mask by the fact it stands for: visibility is decided from positions.

    Before:  o = kvfx.attention(q, k, v, mask, None)
    After:   o = kvfx.attention(q, k, v, None, position_ids, slopes=slopes, window=W)
    """

    name: ClassVar[str] = "match-masks"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Prove each distinct mask once; sites with an unproven mask keep it and are recorded as
        missed.
        """
        proven: dict[fx.Node | None, MaskFact | Miss] = {None: MaskFact(Causal())}
        for node in graph.calls(torch.ops.kvfx.attention.default):
            mask = cast("fx.Node | None", node.args[3])
            mark = origin(node)
            assert mark is not None
            if mask is not None and mask not in proven:
                proven[mask] = prove_mask(graph, mask)
            fact = proven[mask]
            if isinstance(fact, Miss):
                stats.miss(Miss(fact.reason, mark.site))
                graph.missed[mark.site] = Miss(fact.reason, mark.site)
                continue
            with graph.module.graph.inserting_before(node):
                replace(node, self._by_positions(graph, node, fact, mark))
            stats.hit(str(fact))

    def _by_positions(self, graph: Graph, node: fx.Node, fact: MaskFact, mark: Stamp) -> fx.Node:
        """The same attention, which decides by positions what its mask said."""
        slopes = None
        if fact.slopes is not None:
            values = torch.tensor(fact.slopes, device=node.meta["val"].device)
            slopes = add_constant(graph, f"slopes_{mark.site.replace('.', '_')}", values)
        rules = {
            "slopes": slopes,
            "window": fact.seen.size if isinstance(fact.seen, Window) else None,
            "chunk": fact.seen.size if isinstance(fact.seen, Chunk) else None,
        }
        return call(
            graph,
            torch.ops.kvfx.attention.default,
            (*node.args[:3], None, graph.input("position_ids")),
            Stamp(mark.site, f"{mark.rule}, {fact}", self.name),
            **{
                **node.kwargs,
                **{name: value for name, value in rules.items() if value is not None},
            },
        )
