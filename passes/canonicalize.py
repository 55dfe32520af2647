"""The pass that removes what export leaves behind, so that every idea has one spelling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from kvfx.graph import Graph, Level
from kvfx.pass_manager import Pass, Statistics

aten = torch.ops.aten
END = torch.iinfo(torch.int64).max
CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "_guards_fn",
)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Inline sub-modules, erase assertions, and drop every op that returns its operand unchanged.

    Before:  wrap_with_set_grad_enabled(False, sub, x);  _assert_tensor_metadata(x);  to(slice(x, 0,
    0, end), f32)
    After:   x
    """

    name: ClassVar[str] = "canonicalize"
    consumes: ClassVar[Level] = Level.CAPTURED
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Apply the three rules, innermost sub-modules first."""
        while wrapped := [node for node in graph.nodes if _wrapped_module(graph, node) is not None]:
            for node in wrapped:
                _inline(graph, node)
                stats.hit("inline")
        for node in graph.nodes:
            if node.op in ("call_function", "call_module") and any(
                check in str(node.target) for check in CHECKS
            ):
                graph.module.graph.erase_node(node)
                stats.hit("erase-check")
        # users first: what writes in place has to be known when its operand is looked at
        for node in reversed(graph.nodes):
            same = _same_as(node)
            if same is not None:
                for user in node.users:
                    if node.target is aten.contiguous.default and user.target is aten.view.default:
                        user.target = aten.reshape.default
                node.replace_all_uses_with(same)
                graph.module.graph.erase_node(node)
                stats.hit("no-op")


def _wrapped_module(graph: Graph, node: fx.Node) -> fx.GraphModule | None:
    """The sub-module that a `wrap_with_*` node runs, or None."""
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith(
        "wrap_with_"
    ):
        return None
    inner = next(arg for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr")
    module = getattr(graph.module, str(inner.target))
    return module if isinstance(module, fx.GraphModule) else None


def _inline(graph: Graph, node: fx.Node) -> None:
    """Put the body of a wrapped sub-module in the place of its call; its `getitem` users take the
    outputs.
    """
    module = _wrapped_module(graph, node)
    assert module is not None
    first = next(
        i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"
    )
    operands = iter(node.args[first + 1 :])
    copied: dict[fx.Node, Any] = {}
    with graph.module.graph.inserting_before(node):
        for inner in module.graph.nodes:
            if inner.op == "placeholder":
                copied[inner] = next(operands)
            elif inner.op == "output":
                outputs = fx.map_arg(inner.args[0], copied.__getitem__)
            else:
                copied[inner] = graph.module.graph.node_copy(inner, copied.__getitem__)
    for user in list(node.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.module.graph.erase_node(user)
    graph.module.graph.erase_node(node)


def _same_as(node: fx.Node) -> fx.Node | None:
    """The operand that `node` returns unchanged, or None."""
    rule = NO_OPS.get(node.target) if node.op == "call_function" else None
    if any(_writes(user) for user in node.users):
        return None
    if rule is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0] if rule(node, node.args[0]) else None


def _writes(node: fx.Node) -> bool:
    """Whether a node changes an operand in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _always(node: fx.Node, operand: fx.Node) -> bool:
    del node, operand
    return True


def _is_whole_slice(node: fx.Node, operand: fx.Node) -> bool:
    del operand
    start, end, step = (*node.args[2:], *(0, END, 1)[len(node.args) - 2 :])
    return bool(start in (0, None) and end in (END, None) and step == 1)


def _keeps_type(node: fx.Node, operand: fx.Node) -> bool:
    new, old = node.meta["val"], operand.meta["val"]
    return new.dtype == old.dtype and new.device == old.device


def _keeps_shape(node: fx.Node, operand: fx.Node) -> bool:
    new, old = node.meta["val"].shape, operand.meta["val"].shape
    return len(new) == len(old) and all(str(a) == str(b) for a, b in zip(new, old, strict=True))


def _is_dead_dropout(node: fx.Node, operand: fx.Node) -> bool:
    del operand
    return bool(node.args[1] == 0.0) or node.args[2] is False


NO_OPS: dict[object, Callable[[fx.Node, fx.Node], bool]] = {
    aten.slice.Tensor: _is_whole_slice,
    aten.to.dtype: _keeps_type,
    aten.to.dtype_layout: _keeps_type,
    aten.to.device: _keeps_type,
    aten._to_copy.default: _keeps_type,
    aten.expand.default: _keeps_shape,
    aten.view.default: _keeps_shape,
    aten.reshape.default: _keeps_shape,
    aten.dropout.default: _is_dead_dropout,
    aten.detach.default: _always,
    aten.detach_.default: _always,
    aten.type_as.default: _keeps_type,
    aten.alias.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.contiguous.default: _always,
}
