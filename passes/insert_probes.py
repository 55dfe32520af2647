"""The pass that lets a model measure its own attention: each site reports what a plan needs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx
from torch.fx.node import Argument

from kvfx.geometry import Causal, Site
from kvfx.graph import Graph, Level, Miss, ancestors, call, dependents, operand, replace
from kvfx.ops import overload
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import Stamp, origin

aten = torch.ops.aten

# what is measured at each probed site, in the order of the graph's outputs after the logits
STATISTICS = (
    "retention",
    "window_retention",
    "head_retention",
    "entropy",
    "variance",
    "key_entropy",
    "eviction_error",
    "quantization_error",
    "similarity",
)
# points of a retention curve
STEPS = 128
# the last rows of a prompt, which stand for those that will ask (the window of SnapKV and CAKE)
ROWS = 32
# fractions of the past that stay
EVICTION_GRID = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
# bits of keys, and of values (KVTuner); tokens and channels that share their parameters (KIVI)
BITS = (8, 4, 2)
GROUP_SIZE = 32
# eigenvalues that count
RANK = 32


@dataclass(frozen=True)
class InsertProbes(Pass):
    """Let every site whose tokens a policy may choose report `STATISTICS`, as outputs of the graph.

    Before:  o = kvfx.attention(q, k, v, None, position_ids);  x' = x + f(o)
    After:   o = kvfx.attend_prompt(q, k, v, position_ids)
             measured = kvfx.probe(q, k, v, kvfx.score_columns(q, k, live))
             x' = x + f(o);  similarity = kvfx.probe_similarity(x, x')

    Sites with a window, or under a mask that is not proven, attend and report nothing.
    """

    name: ClassVar[str] = "insert-probes"
    consumes: ClassVar[Level] = Level.RAISED
    produces: ClassVar[Level] = Level.CACHED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Rewrite every attention, and add what is measured to the outputs."""
        graph.program = "calibrate"
        sites = {site.name: site for site in graph.sites}
        measured: list[fx.Node | None] = []
        for attention in graph.calls(torch.ops.kvfx.attention.default):
            mark = origin(attention)
            assert mark is not None
            if attention.args[3] is not None:
                stats.miss(Miss("the mask is not proven", mark.site))
                _attend_masked(graph, attention, mark.site)
                continue
            site = sites[mark.site]
            if not is_probed(site):
                stats.miss(Miss(f"the model sees {site.mask}", site.name))
                _attend(graph, attention, site)
                continue
            similarity = _similarity(graph, attention, site, stats)
            measured += [*_probe(graph, attention, site), similarity]
            _attend(graph, attention, site)
            stats.hit("probe")
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        logits = cast(tuple[Argument, ...], output.args[0])
        output.args = ((*logits, *measured),)


def is_probed(site: Site) -> bool:
    """Whether a policy may choose which tokens a site keeps."""
    return isinstance(site.mask, Causal)


def _probe(graph: Graph, attention: fx.Node, site: Site) -> list[fx.Node]:
    """What the site reports but its similarity, one node each."""
    mark = Stamp(site.name, "probe", InsertProbes.name)
    q, k, v, position_ids = (operand(attention, index) for index in (0, 1, 2, 4))
    with graph.module.graph.inserting_before(attention):
        live = call(
            graph, overload("live_rows"), (position_ids,), mark, kv_heads=site.kv_heads
        )  # fmt: skip
        columns = call(graph, overload("score_columns"), (q, k, live), mark, scale=site.scale)
        found = call(
            graph,
            overload("probe"),
            (q, k, v, columns),
            mark,
            scale=site.scale,
            rows=ROWS,
            steps=STEPS,
            fractions=EVICTION_GRID,
            bits=BITS,
            group_size=GROUP_SIZE,
            rank=RANK,
        )
        return [
            call(graph, operator.getitem, (found, index), mark)
            for index in range(len(STATISTICS) - 1)
        ]


def _similarity(
    graph: Graph, attention: fx.Node, site: Site, stats: Statistics
) -> fx.Node | None:  # fmt: skip
    """How alike the residual stream is before and after the attention, where it is found."""
    after = residual_sum(graph, attention)
    if isinstance(after, Miss):
        stats.miss(Miss(after.reason, site.name))
        return None
    before, total = after
    with graph.module.graph.inserting_after(total):
        mark = Stamp(site.name, "similarity", InsertProbes.name)
        return call(graph, overload("probe_similarity"), (before, total), mark)


def residual_sum(graph: Graph, attention: fx.Node) -> tuple[fx.Node, fx.Node] | Miss:
    """The residual stream before the attention, and the node that adds what came of it: the first
    sum behind the attention with something that its queries were computed from.
    """
    above = ancestors([operand(attention, 0)])
    below = dependents(graph, [attention])
    for node in graph.nodes:
        if node not in below or node.target is not aten.add.Tensor:
            continue
        left, right = node.args[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            continue
        branch, residual = (left, right) if left in below else (right, left)
        if branch in below and residual in above and _shape(residual) == _shape(branch):
            return residual, node
    return Miss("nothing that its queries come from is added to what it gives")


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def _attend(graph: Graph, attention: fx.Node, site: Site) -> None:
    """Attention as its site sees, decided from positions."""
    q, k, v, position_ids = (operand(attention, index) for index in (0, 1, 2, 4))
    with graph.module.graph.inserting_before(attention):
        out = call(
            graph,
            overload("attend_prompt"),
            (q, k, v, position_ids),
            Stamp(site.name, "attend", InsertProbes.name),
            scale=site.scale,
            window=site.window,
        )
    replace(attention, out)


def _attend_masked(graph: Graph, attention: fx.Node, name: str) -> None:
    """Attention under the mask that the model computes."""
    repeated = cast(int, attention.kwargs["kv_repeat"]) > 1
    with graph.module.graph.inserting_before(attention):
        out = call(
            graph,
            aten.scaled_dot_product_attention.default,
            attention.args[:4],
            Stamp(name, "attend", InsertProbes.name),
            scale=attention.kwargs["scale"],
            enable_gqa=repeated,
        )
    replace(attention, out)
