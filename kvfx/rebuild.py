"""How a program stores the tensors that K and V are computed from, and computes K and V again."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, fx

from kvfx.cuts import Cut
from kvfx.emit import Emitter
from kvfx.graph import Graph, Miss, call

aten = torch.ops.aten
# tokens of the probe, and those that are left of them, in another order
PROBE, KEPT = 6, [4, 1, 3]


def latent_rows(emit: Emitter) -> fx.Node:
    """What the program's rows give to the cache: the tensors of the site's cut beside each other
    [B, 1, S, W].
    """
    cut = emit.graph.cuts[emit.plan.site.name]
    nodes = {node.name: node for node in emit.graph.nodes}
    rows = []
    for name, axis in zip(cut.names, cut.axes, strict=True):
        node = nodes[name]
        rank = node.meta["val"].dim()
        if (rank, axis) == (4, 2) and node.meta["val"].shape[1] == 1:
            rows.append(node)
            continue
        if axis != 1:
            others = [at for at in range(1, rank) if at != axis]
            node = emit.call(aten.permute.default, node, [0, axis, *others])
        node = node if rank > 2 else emit.call(aten.unsqueeze.default, node, 2)
        node = node if rank < 4 else emit.call(aten.flatten.using_ints, node, 2)
        rows.append(emit.call(aten.unsqueeze.default, node, 1))
    return rows[0] if len(rows) == 1 else emit.call(aten.cat.default, rows, 3)


def rebuilt(emit: Emitter) -> tuple[fx.Node, fx.Node]:
    """K and V [B, K, C, D] of the site's entries, computed from its buffer `latent` [B, 1, C, W]
    by the model's own ops. Entries that are not live give garbage.
    """
    graph, latent = emit.graph, emit.inputs["latent"]
    cut = graph.cuts[emit.plan.site.name]
    given = [_tensor(emit, cut, index, latent) for index in range(len(cut.names))]
    given += [emit.call(aten.sym_size.int, latent, axis) for axis in (0, 2)]
    inputs, copied = iter(given), {}
    for node in cut.template.nodes:
        if node.op == "placeholder":
            copied[node] = next(inputs)
        elif node.op == "get_attr":
            weights = graph.module.graph.find_nodes(op="get_attr")
            copied[node] = next(one for one in weights if one.target == node.target)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
            copied[node] = call(graph, node.target, args, emit.mark, **kwargs)
    k, v = cast(Sequence[fx.Node], cut.template.output_node().args[0])
    return copied[k], copied[v]


def _tensor(emit: Emitter, cut: Cut, index: int, latent: fx.Node) -> fx.Node:
    """One tensor of the cut as the model has it, of all entries."""
    widths, shape, axis = cut.widths, cut.shapes[index], cut.axes[index]
    node = latent
    if len(widths) > 1:
        first = (0, *accumulate(widths))[index]
        node = emit.call(aten.slice.Tensor, latent, 3, first, first + widths[index])
    if axis == 2 and len(shape) == 2 and shape[0] == 1:
        return node
    node = emit.call(aten.select.int, node, 1, 0)
    if not shape:
        return emit.call(aten.squeeze.dim, node, 2)
    if len(shape) > 1:
        node = emit.call(aten.unflatten.int, node, 2, list(shape))
    if axis != 1:
        # tokens go from behind the batch to their place
        order = [0, *range(2, axis + 1), 1, *range(axis + 1, len(shape) + 2)]
        node = emit.call(aten.permute.default, node, order)
    return node


def refute(graph: Graph, cut: Cut, dtype: torch.dtype, device: torch.device) -> Miss | None:
    """Why K and V are not computed token by token from the cut, or None: some tokens alone, in
    another order, must give what they give among others.
    """
    module = fx.GraphModule(graph.module, cut.template)
    generator = torch.Generator().manual_seed(0)
    every, some = [], []
    for shape, axis in zip(cut.shapes, cut.axes, strict=True):
        sizes = [2, *shape]
        sizes.insert(axis, PROBE)
        rows = torch.randn(sizes, generator=generator).to(device, dtype)
        every.append(rows)
        some.append(rows.index_select(axis, torch.tensor(KEPT, device=device)).flip(0))
    with torch.no_grad():
        try:
            wholes, parts = module(*every, 2, PROBE), module(*some, 2, len(KEPT))
        except RuntimeError as error:
            return Miss(f"K and V cannot be computed on their own: {error}")
    for whole, part in zip(wholes, parts, strict=True):
        if whole.shape[2] != PROBE or not _near(whole[:, :, KEPT].flip(0), part):
            return Miss("K and V of a token depend on other tokens")
    return None


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    error = (one.double() - other.double()).abs().max()
    return bool(error <= 64 * torch.finfo(one.dtype).eps * one.double().abs().max())


def structure(graph: Graph, cut: Cut) -> tuple[object, ...]:
    """Equal for cuts that compute K and V in the same way, from other weights."""
    names: dict[fx.Node, str] = {}
    rows: list[object] = [cut.shapes, cut.axes]
    for node in cut.template.nodes:
        names[node] = f"%{len(names)}"
        operands = fx.map_arg((node.args, node.kwargs), names.__getitem__)
        what: object = str(node.target) if node.op == "call_function" else node.op
        if node.op == "get_attr":
            weight = operator.attrgetter(str(node.target))(graph.module)
            what = tuple(weight.shape), weight.dtype
        rows.append((what, repr(operands)))
    return tuple(rows)
