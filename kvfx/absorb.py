"""Attention over what K and V are linear in: matrices are applied to q and to the output."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from kvfx.constants import add_constant
from kvfx.cuts import Cut
from kvfx.emit import Emitter
from kvfx.graph import Graph

aten = torch.ops.aten


def absorbed(emit: Emitter, q: fx.Node, rules: dict[str, Argument]) -> fx.Node:
    """The attention of one row q [B, H, 1, D] over the site's entries `latent` [B, 1, C, W], which
    all heads read as key and as value: [B, H, 1, Dv].

    Scores are q (M x) = (q M) x, and the sum of M' x is M' of the sum, where k = M x and v = M' x.
    """
    site, latent = emit.plan.site, emit.inputs["latent"]
    keys, values = matrices(emit.graph, emit.graph.cuts[site.name], site.dtype, site.device)
    repeat = site.kv_repeat
    into = add_constant(
        emit.graph, f"absorb_k_{site.index}", keys.mT.contiguous().repeat_interleave(repeat, 0)
    )
    out_of = add_constant(emit.graph, f"absorb_v_{site.index}", values.repeat_interleave(repeat, 0))
    length = emit.call(aten.slice.Tensor, emit.length, 1, 0, 1)
    length = emit.call(aten.contiguous.default, length)
    asked = emit.call(aten.matmul.default, q, into)
    out = emit.op(
        "attend_dense", asked, emit.position_ids, latent, latent, length, scale=site.scale, **rules
    )
    return emit.call(aten.matmul.default, out, out_of)


def matrices(
    graph: Graph, cut: Cut, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What computes K and V from the cut's tensors beside each other, if that is linear: [K, W, D]
    and [K, W, Dv], the values of unit vectors.
    """
    units = torch.eye(sum(cut.widths), dtype=dtype, device=device)
    keys, values = run(graph, cut, units)
    return keys[0], values[0]


def is_linear(graph: Graph, cut: Cut, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether K and V are linear in the cut's tensors: random rows x + 2 y give what x and y do."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(-8, 9, (2, sum(cut.widths)), generator=generator).to(device, dtype)
    for found in run(graph, cut, torch.stack((x, y, x + 2 * y))):
        one, other, both = found[0].double().unbind(1)
        error = (both - one - 2 * other).abs().max()
        if not error <= 64 * torch.finfo(dtype).eps * found.double().abs().max():
            return False
    return True


@torch.no_grad()
def run(graph: Graph, cut: Cut, rows: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [1, K, T, D] of T rows [T, W] of the cut's tensors beside each other."""
    module = fx.GraphModule(graph.module, cut.template)
    ends = list(accumulate(cut.widths))
    given = []
    for end, width, shape, axis in zip(ends, cut.widths, cut.shapes, cut.axes, strict=True):
        part = rows[None, :, end - width : end].reshape(1, len(rows), *shape)
        given.append(part.movedim(1, axis).contiguous())
    return module(*given, 1, len(rows))
