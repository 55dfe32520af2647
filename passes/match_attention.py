"""The pass that raises every attention computation to one op, and the peelers that read its
operands.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any, ClassVar, cast

import torch
from torch import fx

from kvfx.errors import CaptureError
from kvfx.graph import Graph, Level, Miss, call, operand, replace, site_path
from kvfx.pass_manager import Pass, Statistics
from kvfx.passes.softmax_root import WrittenOut, softmax_roots, stray_softmaxes
from kvfx.passes.written_operands import AttentionOperands, written_operands
from kvfx.provenance import Stamp

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SDPA_DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


@dataclass(frozen=True)
class MatchAttention(Pass):
    """Raise every attention computation to `kvfx.attention`.

    Before:  k4 = reshape(expand(unsqueeze(k, 2)));  o = sdpa(q, k4, v4, mask, scale=s)
             or o = matmul(softmax(matmul(q, transpose(k4, -1, -2)) * s + mask, -1), v4)
    After:   o  = kvfx.attention(q, k, v, mask, scale=s, kv_repeat=4)
    """

    name: ClassVar[str] = "match-attention"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Match every root; one that does not match is recorded in `graph.missed` under its
        site.
        """
        roots, written_out = attention_roots(graph), softmax_roots(graph)
        for site, stray in stray_softmaxes(graph).items():
            stats.miss(stray)
            graph.missed[site] = stray
        if not roots and not graph.missed:
            raise CaptureError(
                "no attention was found in the captured graph: kvfx raises "
                "scaled_dot_product_attention, and products around a softmax; this model computes "
                "attention another way (or has none)"
            )
        for site, root in roots.items():
            rule = "softmax" if root in written_out else "sdpa"
            found = (
                match_written_out(graph, root, written_out[root])
                if root in written_out
                else match_sdpa(root)
            )
            if isinstance(found, Miss):
                stats.miss(Miss(found.reason, site))
                graph.missed[site] = Miss(found.reason, site)
                continue
            with graph.module.graph.inserting_before(root):
                raised = call(
                    graph,
                    torch.ops.kvfx.attention.default,
                    (found.q, found.k, found.v, found.mask, None),
                    Stamp(site, rule, self.name),
                    scale=found.scale,
                    kv_repeat=found.kv_repeat,
                    **found.rules(),
                )
                if found.flat:
                    mark = Stamp(site, rule, self.name)
                    raised = call(graph, aten.flatten.using_ints, (raised, 0, 1), mark)
            replace(root, raised)
            stats.hit(rule)


def attention_roots(graph: Graph) -> dict[str, fx.Node]:
    """The attention computations of a captured or canonical graph, by the name of their site."""
    roots: dict[str, fx.Node] = {}
    seen: Counter[str] = Counter()
    products = softmax_roots(graph)
    for root in (node for node in graph.nodes if node.target is SDPA or node in products):
        path = site_path(root)
        seen[path] += 1
        roots[path if seen[path] == 1 else f"{path}#{seen[path]}"] = root
    return roots


def match_sdpa(root: fx.Node) -> AttentionOperands | Miss:
    """Read the operands of one SDPA call, or say why they cannot be read."""
    named = dict(zip(("query", "key", "value", *SDPA_DEFAULTS), root.args, strict=False))
    args: dict[str, Any] = {**SDPA_DEFAULTS, **named, **root.kwargs}
    q, k, v, mask = args["query"], args["key"], args["value"], args["attn_mask"]
    if args["dropout_p"] != 0.0:
        return Miss(f"dropout is live (p={args['dropout_p']}): put the model into eval mode")
    if mask is None and not args["is_causal"]:
        return Miss("attention is bidirectional: it has no mask and is not causal")
    if mask is not None and args["is_causal"]:
        return Miss("attention has a mask and is_causal: kvfx expects one of them")
    scale = args["scale"]
    if scale is None:
        scale = 1.0 / math.sqrt(q.meta["val"].shape[-1])
    if not isinstance(scale, (int, float)):
        return Miss("the scale is not a constant")
    return _grouped(AttentionOperands(q, k, v, mask, float(scale)), gqa=args["enable_gqa"])


def match_written_out(graph: Graph, root: fx.Node, written: WrittenOut) -> AttentionOperands | Miss:
    """The same of an attention that is written out, whose mask has to be there."""
    found = written_operands(graph, root, written)
    return found if isinstance(found, Miss) else _grouped(found, gqa=False)


def _grouped(found: AttentionOperands, *, gqa: bool) -> AttentionOperands | Miss:
    """The operands with K and V before they are repeated for grouped queries."""
    k, k_repeat = peel_repeat_kv(found.k)
    v, v_repeat = peel_repeat_kv(found.v)
    if k_repeat != v_repeat:
        return Miss(f"K and V are repeated differently ({k_repeat} and {v_repeat} times)")
    heads, kv_heads = found.q.meta["val"].shape[1], k.meta["val"].shape[1]
    if k_repeat == 1 and (gqa or kv_heads == 1):
        # one KV head is broadcast to all query heads
        k_repeat = heads // kv_heads
    if heads != kv_heads * k_repeat:
        return Miss(
            f"{heads} query heads do not divide into {kv_heads} KV heads repeated {k_repeat} times"
        )
    return replace_fields(found, k=k, v=v, kv_repeat=k_repeat)


def peel_repeat_kv(node: fx.Node) -> tuple[fx.Node, int]:
    """The tensor whose heads `node` repeats, head by head, and how often (1: it repeats nothing).

    Recognises reshape(expand(unsqueeze(k, 2))) and repeat_interleave(k, n, 1).
    """
    if node.target is aten.repeat_interleave.self_int and node.args[2:] == (1,):
        return operand(node, 0), cast(int, node.args[1])
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return node, 1
    expanded = operand(node, 0)
    if expanded.target is aten.clone.default:
        expanded = operand(expanded, 0)
    if expanded.target is not aten.expand.default:
        return node, 1
    inserted = operand(expanded, 0)
    if inserted.target is not aten.unsqueeze.default or inserted.args[1] != 2:
        return node, 1
    source = operand(inserted, 0)
    shape, repeats = node.meta["val"].shape, expanded.meta["val"].shape[2]
    if len(shape) != 4 or shape[1] != source.meta["val"].shape[1] * repeats:
        return node, 1
    return source, int(repeats)
